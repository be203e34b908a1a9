//! Save a machine to a file while its guest runs, and restore it.
//!
//! Saving works like a migration: passes, switchover, devices. The difference is that there is no peer. The [`Sender`] is set up
//! with blocks in the file ([`set_up_into`]), and a [`Capture`] is used instead of the main connection. Each page is copied once,
//! from guest memory to its place in the file, by as many threads as there are channels. The file is a mapped-ram file, which QEMU
//! 9.0 and later and the program `multifd` can read.
//!
//! ```standalone_crate
#![doc = include_str!("code/snapshot.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//!
//! fn main() -> Result<()> {
//!     # use multifd::ram::{BlockName, PageSize};
//!     # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     # let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//!     # let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//!     # let folder = std::env::temp_dir().join(format!("multifd-guide-{}", std::process::id()));
//!     # fs::create_dir_all(&folder)?;
//!     # let path = folder.join("machine.ram");
//!     machine.run();
//!     save(&mut machine, &path, &Stop::new())?;
//!     let count = machine.count; // the same as in the file: the guest is stopped
//!     machine.run(); // no other process runs it, so it may continue here
//!
//!     let restored = load(&path, &Stop::new())?;
//!     # fs::remove_dir_all(&folder)?;
//!     assert!(restored.is_whole() && restored.count == count);
//!     Ok(())
//! }
//! ```
//!
//! # Options
//!
//! - [`CaptureOptions::durable`]: the file is on the disk when the capture is complete. Channels then bypass the page cache,
//!   unless [`direct_io`](crate::mapped_ram::CaptureOptions::direct_io) is set otherwise. Without `durable` the file is in the page
//!   cache, as with QEMU. **Warning:** it may then be incomplete after a power failure.
//! - [`MigrateOptions`](multifd::live::MigrateOptions), as for a migration: how long the guest may be stopped, and how many bytes
//!   per second may be written. With `durable` the guest is also stopped while the disk writes the rest.
//! - [`SendOptions::channels`](multifd::SendOptions::channels). Compression and `zero-copy-send` are for connections only and
//!   are refused, because each page has a fixed place in the file.
//!
//! # What can go wrong
//!
//! If the disk is full, the file is not writable, or the capture is cancelled,
//! [`Migration::run`](multifd::live::Migration::run) returns an error, for a page with block and offset. The guest continues.
//! No reader accepts the incomplete file. If a restore fails, drop the memory. No program may change the file while it is
//! restored; a file that becomes shorter causes an error, never a signal.
//!
//! # A machine of QEMU
//!
//! [`Restore`](crate::mapped_ram::Restore) also reads a file of QEMU; only QEMU can interpret the devices in it.
//! [`Capture::of_machine`] writes such a machine to a file again, with its devices unchanged.
//!
//! [`Sender`]: multifd::Sender
//! [`set_up_into`]: multifd::Sender::set_up_into
//! [`Capture`]: crate::mapped_ram::Capture
//! [`Capture::of_machine`]: crate::mapped_ram::Capture::of_machine
//! [`CaptureOptions::durable`]: crate::mapped_ram::CaptureOptions::durable
