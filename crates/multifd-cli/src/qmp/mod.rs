//! A running QEMU, through its QMP socket.
//!
//! ```text
//! address ─▶ connection   commands and their replies; events are ignored
//!            ├── settings   capabilities and parameters of migration: changed, and put back afterwards
//!            ├── machine    what the guest is: version, machine type, RAM, processors, UUID, PCI devices
//!            ├── migration  states of migration and of the guest, and the wait for them
//!            └── meeting    the address at which this program and that QEMU connect to each other
//! ```
//!
//! The socket's owner controls this program's guest anyway, but its texts are printed escaped, and a reply is bounded.

mod address;
mod connection;
mod machine;
mod meeting;
mod migration;
mod settings;

pub(crate) use address::QmpAddress;
pub(crate) use connection::{Qmp, QmpError, Version};
pub(crate) use machine::Machine;
pub(crate) use meeting::{Listens, Meeting, listening_at};
pub(crate) use migration::{Migration, MigrationStatus, RUNNING, resume, run_state};
pub(crate) use settings::{Changed, Settings, Wanted};
