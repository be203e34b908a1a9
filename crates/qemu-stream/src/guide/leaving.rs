//! The source: migrate a machine while its guest runs.
//!
//! # A machine
//!
//! The guest of this guide is a thread that counts and writes each number to the next page. Its only device is the count.
//! So every page shows whether a write was lost:
//!
//! ```standalone_crate
#![doc = include_str!("code/machine.rs")]
//! # fn main() {}
//! ```
//!
//! A migration calls the methods of [`Guest`]:
//!
//! - `devices` before anything is sent. A device that no destination accepts is refused while the guest runs.
//! - `stop` once, in the thread of the migration, when the remaining pages fit into the downtime.
//! - `save` after that. It returns the devices: for each a name, an instance number if there are several, the version of its
//!   layout, and bytes that only this device interprets.
//! - `resume` if the migration fails after `stop` and the guest ran before.
//!
//! # The migration
//!
//! ```standalone_crate
#![doc = include_str!("code/leave.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//! # mod arrive { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/arrive.rs")); }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//!     # use multifd::{channel::Listener, ram::*};
//!     # let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//!     # let address: Address = listener.local_address().clone();
//!     # let destination = std::thread::spawn(move || arrive::arrive(listener, &Stop::new(), 1));
//!     let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//!     let mut machine = Machine::new(std::sync::Arc::new(RamBlocks::new(vec![block])?), 0);
//!     machine.run();
//!
//!     let info = leave(&mut machine, &address, &Stop::new())?;
//!     println!("{:?} of downtime, {} pages", info.downtime, info.ram.normal);
//!     assert!(!machine.is_running()); // it runs at the destination now and must not run here again
//!     # let mut arrived = destination.join().expect("no panic")?;
//!     # arrived.halt();
//!     # assert!(arrived.is_whole() && arrived.count >= machine.count);
//!     Ok(())
//! }
//! ```
//!
//! # Options
//!
//! - [`SendOptions`](multifd::SendOptions): the number of channels, compression. The destination detects the number.
//! - [`MigrateOptions`](multifd::live::MigrateOptions): `downtime_limit` decides when the guest is stopped; `max_bandwidth`
//!   limits the use of the network. If a guest writes faster than the network transfers, the switchover is never reached: raise
//!   the downtime limit, or switch `auto_converge` on, which slows the guest down through
//!   [`Guest::throttle`](multifd::live::Guest::throttle).
//! - [`switchover_timeout`](multifd::live::MigrateOptions::switchover_timeout): how long the guest may be stopped before the
//!   destination has confirmed that it has all of RAM, 8 s by default. After that the guest continues here.
//! - TLS, other addresses, links of your own: [`multifd::channel`].
//!
//! During the migration, [`Source::progress`](crate::source::Source::progress) returns the numbers in any thread, with
//! the names of QEMU's `query-migrate`.
//!
//! [`Guest`]: multifd::live::Guest
