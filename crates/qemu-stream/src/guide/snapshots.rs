//! A machine into a file while its guest runs, and out of it again.
//!
//! A file is written as a machine migrates: passes, switchover, devices. What differs is that nobody is at the other end:
//! the [`Sender`] is set up into blocks that lie in the file ([`set_up_into`]), and in the place of main stands a
//! [`Capture`]. Each page goes by one copy from guest memory to its place in the file, by as many threads as there are
//! channels. The file is a mapped-ram file, which QEMU 9.0 and later and the program `multifd` know.
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
//!     let count = machine.count; // that of the file: the guest stands
//!     machine.run(); // nobody else runs it, so it may run on here
//!
//!     let restored = load(&path, &Stop::new())?;
//!     # fs::remove_dir_all(&folder)?;
//!     assert!(restored.is_whole() && restored.count == count);
//!     Ok(())
//! }
//! ```
//!
//! # What can be chosen
//!
//! - [`CaptureOptions::durable`]: the file is on the disk when the capture is complete. Channels then write past the page
//!   cache, unless [`direct_io`](crate::mapped_ram::CaptureOptions::direct_io) says otherwise. Without it the file is in the page cache, as
//!   QEMU leaves it, and the name of a file says nothing about a power cut.
//! - [`MigrateOptions`](multifd::live::MigrateOptions), as for a migration: how long the guest may stand, how much a
//!   second may be written. With `durable` the guest also stands while the disk takes the rest.
//! - [`SendOptions::channels`](multifd::SendOptions::channels). Compression and `zero-copy-send` are for connections,
//!   and refused: each page has its place in the file.
//!
//! # What can go wrong
//!
//! A full disk, a file that nobody may write, a cancel: [`Migration::run`](multifd::live::Migration::run) says what
//! and, of a page, which block and offset; the guest runs on, and what is left in the file no reader takes for a machine.
//! A restore that fails leaves memory to be dropped. Nobody may change the file while it is restored; one that is cut
//! shorter is an error, never a signal.
//!
//! # A machine of QEMU's
//!
//! [`Restore`](crate::mapped_ram::Restore) takes the file of a QEMU as well, whose devices are bytes for QEMU alone.
//! [`Capture::of_machine`] writes such a machine again, with its devices as they came.
//!
//! [`Sender`]: multifd::Sender
//! [`set_up_into`]: multifd::Sender::set_up_into
//! [`Capture`]: crate::mapped_ram::Capture
//! [`Capture::of_machine`]: crate::mapped_ram::Capture::of_machine
//! [`CaptureOptions::durable`]: crate::mapped_ram::CaptureOptions::durable
