//! The destination: a machine comes in and runs on.
//!
//! ```standalone_crate
#![doc = include_str!("code/arrive.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//! # mod leave { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/leave.rs")); }
//!
//! fn main() -> Result<(), Box<dyn StdError + Send + Sync>> {
//!     let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?; // port 0 takes a free one
//!     let address = listener.local_address().clone();
//!     # let source = std::thread::spawn(move || -> Result<u64, Error> {
//!     #     use multifd::ram::{BlockName, PageSize};
//!     #     let memory = Memory::Mapped(Mapping::anonymous(2 << 20).expect("memory"));
//!     #     let name = BlockName::new("ram").expect("a name");
//!     #     let block = RamBlock::new(name, 2 << 20, PageSize::KIB_4, memory)?;
//!     #     let mut machine = Machine::new(std::sync::Arc::new(RamBlocks::new(vec![block])?), 0);
//!     #     machine.run();
//!     #     leave::leave(&mut machine, &address, &Stop::new())?;
//!     #     Ok(machine.count)
//!     # });
//!     let mut machine = arrive(listener, &Stop::new(), 1)?;
//!     machine.halt();
//!     assert!(machine.is_whole());
//!     # assert!(machine.count >= source.join().expect("no panic")?);
//!     Ok(())
//! }
//! ```
//!
//! # The order matters
//!
//! - **Restore before the word.** [`Pending::confirm`] is the moment at which the guest changes hands. What can fail has to
//!   have failed before: memory, devices, a disk that must be opened. Until then the guest goes on at the source whatever
//!   happens here: an error, a panic, a drop.
//! - **Run after the word**, and only if `confirm` was well. It looks whether the source is still there: one that was
//!   cancelled takes its guest back. If `confirm` fails, the guest must not run here.
//! - **As it was.** A guest that was paused at the source stays paused ([`Confirmed::run_state`]).
//! - **Then the channels.** [`Confirmed::finish`] takes leave of them, after the guest has been let go: it waits for the
//!   source, and nothing that goes wrong there matters any more.
//!
//! # What a peer may do to you
//!
//! Every length, count, offset and name is checked before it is used, and every wait has a limit or ends with the
//! [`Stop`](multifd::channel::Stop). The closure decides how much memory a
//! source may ask for: compare the list with the machine you were told to expect. The device bytes are yours to
//! check. Whoever can connect can be the source, unless you use `multifd::channel::tls` (feature `tls`).
//!
//! # How many channels
//!
//! Nothing in the stream says it, and by default it is found out. Where packets get lost between the hosts, give the
//! number: [`ChannelCount::Exact`](multifd::ChannelCount::Exact).
//!
//! [`Confirmed::finish`]: crate::arrival::Confirmed::finish
//! [`Confirmed::run_state`]: crate::arrival::Confirmed::run_state
//! [`Pending::confirm`]: crate::arrival::Pending::confirm
