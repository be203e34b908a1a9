//! The destination: receive a machine and run it.
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
//!     #     use multifd::ram::{BlockName, Mapping, Memory, PageSize, RamBlock, RamBlocks};
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
//! 1. **Restore before you confirm.** [`Pending::confirm`] transfers the ownership of the guest. Do everything that can fail
//!    before it: memory, devices, opening a disk. Until then the guest continues at the source after any failure here: an
//!    error, a panic, a drop.
//! 2. **Run the guest after you confirm**, and only if `confirm` returned `Ok`. `confirm` checks that the source is still
//!    connected: a source that was cancelled keeps its guest. If `confirm` fails, the guest must not run here.
//! 3. **Keep the run state.** A guest that was paused at the source stays paused ([`Confirmed::run_state`]).
//! 4. **Close the channels last.** [`Confirmed::finish`] waits for the source to close them. Call it after the guest runs;
//!    errors there no longer matter.
//!
//! # What a hostile peer can do
//!
//! Every length, count, offset and name is checked before it is used. Every wait has a limit or ends with the
//! [`Stop`](multifd::channel::Stop). You decide how much memory a source may request: compare the list
//! with the machine that you expect, in the closure of [`Arrival::load`], or after [`Arrival::announced`], which returns the
//! list and waits for your blocks. You have to check the device bytes. Anyone who can connect can be the source, unless you use
//! `multifd::channel::tls` (feature `tls`).
//!
//! # Number of channels
//!
//! By default the number is detected. If packets can get lost between the hosts, set the number:
//! [`ChannelCount::Exact`](multifd::ChannelCount::Exact).
//!
//! [`Arrival::announced`]: crate::arrival::Arrival::announced
//! [`Arrival::load`]: crate::arrival::Arrival::load
//! [`Confirmed::finish`]: crate::arrival::Confirmed::finish
//! [`Confirmed::run_state`]: crate::arrival::Confirmed::run_state
//! [`Pending::confirm`]: crate::arrival::Pending::confirm
