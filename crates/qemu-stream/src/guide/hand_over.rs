//! Hand a machine over to another process of the same host, such as a newer version of the monitor, without copying its memory.
//!
//! The memory must be a mapping of a file that both processes can map: a memfd, or a file on tmpfs or of huge pages. The source sends
//! the descriptors before the main stream, and then migrates as to another host; only the devices are sent. The guest is stopped for as
//! long as they take: a few milliseconds.
//!
//! ```standalone_crate
#![doc = include_str!("code/hand_over.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//!
//! fn main() -> Result<()> {
//!     # use multifd::ram::BlockName;
//!     # let io = |error| Error::io("make a file", error);
//!     # let path = std::env::temp_dir().join(format!("multifd-guide-memory-{}", std::process::id()));
//!     # let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).map_err(io)?;
//!     # file.set_len(1 << 20).map_err(io)?;
//!     # std::fs::remove_file(&path).map_err(io)?;
//!     # let block = BlockName::new("ram").expect("a name");
//!     # let memory = SharedMemory { block, file: file.try_clone().map_err(io)?, offset: 0, length: 1 << 20 };
//!     # let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block_of(&memory)?])?), 0);
//!     # machine.run();
//!     # let address = Address::Unix(path);
//!     let (listener, handed) = HandOverListener::bind(&address).map_err(io)?; // in the other process
//!     let taker = std::thread::spawn(move || take_over(listener, &handed));
//!     hand_over(&mut machine, &file, &address)?;
//!     let mut machine = taker.join().expect("no panic")?;
//!     machine.halt();
//!     assert!(machine.is_whole());
//!     Ok(())
//! }
//! ```
//!
//! # Rules
//!
//! - Until `confirm` has returned, the source may continue with this memory. So the destination writes nothing to it before that: no
//!   device may complete a request, and no vCPU may run.
//! - After `migrate` has returned `Ok`, the source writes nothing any more. It should end, or unmap the memory.
//! - If the source cannot know which side has the guest ([`Error::OwnerUnknown`](multifd::Error::OwnerUnknown)), it must not continue:
//!   the destination may have run the guest, and the memory is then newer than the devices at the source.
//! - Seal a memfd against shrinking (`F_SEAL_SHRINK`): otherwise either process could take memory away from the other one.
//! - Blocks that are not handed over, such as ROMs in anonymous memory, are sent over main. There are no channels.
