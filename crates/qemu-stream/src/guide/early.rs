//! When pre-copy does not end: the guest moves before its memory. Feature `fault`.
//!
//! Passes end when the guest writes less in a pass than can be sent within the downtime. A guest that writes faster than the line
//! carries never gets there. With post-copy it moves first, and the rest of its memory follows: over all channels, and
//! the pages that it needs first. The time for which it is stopped does not depend on how much it writes, or on the size of its memory.
//!
//! ```standalone_crate
#![doc = include_str!("code/early.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//!
//! fn main() -> Result<()> {
//!     # use std::sync::Arc;
//!     # use multifd::ram::{BlockName, FaultError, FaultsFrom, Features, PageSize, Userfault};
//!     # if let Err(why @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. } | FaultError::NoUserfaultfd)) =
//!     #     Userfault::open(Features::POISON, FaultsFrom::Everything)
//!     # {
//!     #     return Ok(eprintln!("{why}"));
//!     # }
//!     # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     # let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//!     # let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//!     # machine.run();
//!     # let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//!     # let address = listener.local_address().clone();
//!     let there = std::thread::spawn(move || arrive_early(listener, &Stop::new()));
//!     leave_early(&mut machine, &address, PostcopyWhen::Start, &Stop::new())?;
//!     let (mut machine, running) = there.join().expect("no panic")?;
//!     let finished = running.ok_or("it has switched")?.finish()?; // all memory is here
//!     println!("{} faults, of which 99 % took less than {:?}", finished.faults.faults, finished.faults.p99);
//!     machine.halt();
//!     assert!(machine.is_whole());
//!     Ok(())
//! }
//! ```
//!
//! # When it switches
//!
//! [`PostcopyWhen`] is a part of [`MigrateOptions`]: at the start, when no end can be predicted, after a number of passes or some
//! time, or only by [`Control::start_postcopy`]. A request ends the pass that is being made.
//!
//! # Who owns the guest
//!
//! | Moment | Something fails, or a connection breaks | Guest |
//! | --- | --- | --- |
//! | passes; the guest is stopped; stale pages are dropped | [`Source::run`] returns the error | continues at the source |
//! | the package with the devices is being written | the same | continues at the source |
//! | the package was written, [`Early::confirm`] has not returned | the destination refuses ([`Early::refuse`], a drop, a panic): the source gets the reason, also when it has to return for it | continues at the source |
//! | | the connection breaks | nobody's yet: stopped at the source, which is [`Interrupted`] and asks when it returns |
//! | [`Early::confirm`] has returned | any connection breaks, or all of them | **runs at the destination**, on the pages that are there; the source is [`Interrupted`] and resumes, as often as needed |
//! | | the process of the source ends | at the destination, without the missing pages: wait, poison or stop is decided there |
//! | | the process of the destination ends | lost with that process |
//! | all memory has arrived | | at the destination; the source can go |
//!
//! While [`Running`] exists, an access to a missing page waits. When it is dropped, missing pages are poisoned: an access to one fails,
//! and never finds zeros. So stop the vCPUs before that.
//!
//! # What it needs
//!
//! - At the destination: Linux 6.6, and the privilege for faults that the chapter [lazy](super::lazy) describes. What is missing is an
//!   error before the source stops its guest.
//! - Memory that no other process accesses: faults of other processes are not delivered here.
//! - Both sides: [`ArrivalOptions::run_early`] and [`MigrateOptions::postcopy`]. A destination without it refuses the switch, and the
//!   guest continues.
//!
//! With a destination of this library, pages go over the channels, and one of several channels carries nothing but requested
//! pages. With any other one they go over the main connection, as QEMU sends them. [`PostcopyInfo`] says which. Without channels,
//! [`PostcopyOptions::preempt`] gives requested pages a connection of their own, as QEMU's capability `postcopy-preempt` does, which a
//! QEMU as the destination needs for it.
//!
//! [`MigrateOptions`]: multifd::live::MigrateOptions
//! [`MigrateOptions::postcopy`]: multifd::live::MigrateOptions::postcopy
//! [`PostcopyWhen`]: multifd::live::PostcopyWhen
//! [`Control::start_postcopy`]: multifd::live::Control::start_postcopy
//! [`Source::run`]: crate::source::Source::run
//! [`Interrupted`]: crate::outgoing::postcopy::Interrupted
//! [`PostcopyOptions::preempt`]: crate::outgoing::postcopy::PostcopyOptions::preempt
//! [`PostcopyInfo`]: crate::outgoing::postcopy::PostcopyInfo
//! [`Early::confirm`]: crate::arrival::Early::confirm
//! [`Early::refuse`]: crate::arrival::Early::refuse
//! [`Running`]: crate::arrival::Running
//! [`ArrivalOptions::run_early`]: crate::arrival::ArrivalOptions::run_early
