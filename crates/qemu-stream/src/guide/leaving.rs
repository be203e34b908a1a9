//! The source: a machine goes while its guest runs.
//!
//! # A machine
//!
//! The guest of this manual is a thread that counts and writes each number to the page that is next. Its one device
//! is the count. So every page tells whether a write was lost:
//!
//! ```standalone_crate
#![doc = include_str!("code/machine.rs")]
//! # fn main() {}
//! ```
//!
//! [`Guest`] is what a migration wants of it. `devices` is asked before anything is sent, so that what a destination would
//! not take is refused while the guest runs. `stop` is called once, in the thread of the migration, when what remains fits
//! into the downtime, and says whether the guest ran. `save` gives the devices: for each a name, a number if there are
//! several, the version of its layout, and bytes that nobody but that device looks at. `resume` is called if the migration
//! fails after that, for a guest that ran.
//!
//! # The way out
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
//!     let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//!     machine.run();
//!
//!     let info = leave(&mut machine, &address, &Stop::new())?;
//!     println!("{:?} of downtime, {} pages", info.downtime, info.ram.normal);
//!     assert!(!machine.is_running()); // it runs at the destination now, and must not run here again
//!     # let mut arrived = destination.join().expect("no panic")?;
//!     # arrived.halt();
//!     # assert!(arrived.is_whole() && arrived.count >= machine.count);
//!     Ok(())
//! }
//! ```
//!
//! # What can be chosen
//!
//! - [`SendOptions`](multifd::SendOptions): the number of channels, compression. The destination finds the number out.
//! - [`MigrateOptions`](multifd::live::MigrateOptions): `downtime_limit` decides when the guest is stopped,
//!   `max_bandwidth` what the network is left. A guest that writes faster than the network carries never comes to the
//!   switchover: raise the limit, or have `auto_converge` hold it back through
//!   [`Guest::throttle`](multifd::live::Guest::throttle).
//! - [`switchover_timeout`](multifd::live::MigrateOptions::switchover_timeout): how long the guest may stand before the
//!   destination is known to have all of RAM, 8 s by default. Then it goes on here.
//! - TLS, other addresses, links of your own: [`multifd::channel`].
//!
//! While it runs, [`Source::progress`](crate::source::Source::progress) has the numbers for any thread, with
//! the names of QEMU's `query-migrate`.
//!
//! [`Guest`]: multifd::live::Guest
