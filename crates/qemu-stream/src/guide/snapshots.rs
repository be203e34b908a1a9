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
//! # Only what changed
//!
//! A *delta* has the pages that differ from an earlier file, its base. [`Capture::since`] writes it. With a [`Base`] alone, all memory
//! is compared with the base. With a dirty log that is kept from one capture to the next ([`KeptLog`]), only what was written since is
//! read. Writes that the log does not know are lost, so it must be active all the time: it owns the log of the machine.
//!
//! ```standalone_crate
//! # #![allow(dead_code, unused_imports)]
//! use std::{fs::File, path::Path, sync::Arc};
//!
//! use multifd::{SendOptions, Sender, channel::Stop, live::{Guest, MigrateOptions, Migration}, ram::{DirtyLog, KeptLog}};
//! use qemu_stream::{
//!     format::{Configuration, MachineType},
//!     mapped_ram::{Base, Capture, CaptureOptions, Captured, Restore, StoredMachine},
//! };
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//! # use machine::Machine;
//! # type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
//!
//! /// Captures the machine; with a base only what differs from it.
//! fn night(machine: &mut Machine, log: &mut impl DirtyLog, base: Option<&Base>, path: &Path) -> Result<Captured> {
//!     let file = File::options().read(true).write(true).create_new(true).open(path)?;
//!     let configuration = Configuration::new(MachineType::new("my-vmm-1")?);
//!     let (blocks, options) = (machine.blocks.clone(), CaptureOptions::new().durable(true));
//!     let mut capture = match base {
//!         None => Capture::of_guest(file, configuration, &blocks, &options)?,
//!         Some(base) => Capture::since(base, file, configuration, &blocks, &options)?,
//!     };
//!     let mut sender = Sender::new(SendOptions::new().channels(2), blocks, Stop::new())?;
//!     sender.set_up_into(capture.blocks().clone())?;
//!     Migration::new(MigrateOptions::new(), sender)?.run(&mut capture, log, machine)?;
//!     Ok(*capture.captured().ok_or("durable captures have digests")?)
//! }
//!
//! fn main() -> Result<()> {
//!     # use multifd::ram::{BlockName, Mapping, Memory, PageSize, RamBlock, RamBlocks};
//!     # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     # let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//!     # let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//!     # let folder = std::env::temp_dir().join(format!("multifd-guide-delta-{}", std::process::id()));
//!     # std::fs::create_dir_all(&folder)?;
//!     let (sunday, monday) = (folder.join("sunday"), folder.join("monday"));
//!     let mut log = KeptLog::new(machine.writes.reader()?); // for the life of the machine
//!     let captured = night(&mut machine, &mut log, None, &sunday)?;
//!     machine.run();
//!     let base = Base::new(&StoredMachine::open(&sunday, 0)?, "sunday")?; // its path from the folder of the delta
//!     night(&mut machine, &mut log, Some(&base.with_log(&captured)?), &monday)?;
//!
//!     let stored = StoredMachine::open(&monday, 0)?; // and its bases
//!     let blocks = Arc::new(stored.blocks().in_new_memory()?);
//!     Restore::new(&stored).run(&blocks, &Stop::new())?;
//!     # std::fs::remove_dir_all(&folder)?;
//!     assert!(Machine::new(blocks, machine.count).is_whole());
//!     Ok(())
//! }
//! ```
//!
//! A log that was not kept since the base was captured is refused: of another machine, started again, or read by another capture
//! since. A capture that fails loses nothing. [`Merge`](crate::mapped_ram::Merge) makes a whole file of a chain.
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
//! [`Base`]: crate::mapped_ram::Base
//! [`Capture::since`]: crate::mapped_ram::Capture::since
//! [`KeptLog`]: multifd::ram::KeptLog
//! [`Sender`]: multifd::Sender
//! [`set_up_into`]: multifd::Sender::set_up_into
//! [`Capture`]: crate::mapped_ram::Capture
//! [`Capture::of_machine`]: crate::mapped_ram::Capture::of_machine
//! [`CaptureOptions::durable`]: crate::mapped_ram::CaptureOptions::durable
