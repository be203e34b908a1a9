//! Run a machine out of a file before its memory is there. Feature `fault`.
//!
//! A [restore](super::snapshots) reads all memory, then the guest runs. [`Restore::lazy`] turns this around: the memory is armed
//! (`userfaultfd`), the guest runs at once, and each page is loaded when it is first accessed, or before that. Several machines
//! can run out of one file; they have only the page cache in common.
//!
//! ```standalone_crate
#![doc = include_str!("code/lazy.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//! # mod snapshot { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/snapshot.rs")); }
//!
//! fn main() -> Result<()> {
//!     # use multifd::{channel::Stop, ram::{BlockName, FaultError, PageSize}};
//!     # use qemu_stream::mapped_ram::LazyError;
//!     # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     # let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//!     # let mut captured = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//!     # let folder = std::env::temp_dir().join(format!("multifd-guide-lazy-{}", std::process::id()));
//!     # std::fs::create_dir_all(&folder)?;
//!     # let path = folder.join("machine.ram");
//!     # captured.run();
//!     # snapshot::save(&mut captured, &path, &Stop::new())?;
//!     # let loaded = load_lazily(&path);
//!     # std::fs::remove_dir_all(&folder)?;
//!     # let refused = loaded.as_ref().err().and_then(|error| error.downcast_ref::<LazyError>());
//!     # if let Some(LazyError::Fault(why @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. }))) = refused {
//!     #     return Ok(eprintln!("{why}"));
//!     # }
//!     # let load_lazily = |_: &std::path::PathBuf| loaded;
//!     let (mut machine, pager) = load_lazily(&path)?;
//!     machine.run(); // its memory is not there yet
//!     let stats = pager.finish(Some(Duration::from_secs(600)))?; // now it is
//!     println!("{} faults, of which 99 % took less than {:?}", stats.faults, stats.p99);
//!     machine.halt();
//!     assert!(machine.is_whole());
//!     Ok(())
//! }
//! ```
//!
//! # What it needs
//!
//! - Linux 6.7, and for faults of vCPUs and system calls a privilege: access to `/dev/userfaultfd`, `CAP_SYS_PTRACE`, or the sysctl
//!   `vm.unprivileged_userfaultfd=1`. What is missing is an error before anything is armed, with the remedy.
//! - New memory: private, a memory file, or huge pages. A page of huge memory is loaded as a whole.
//! - The file, unchanged, until [`finish`] has returned. With [digests], a page that was changed is found.
//!
//! # What can go wrong
//!
//! | Event | What happens |
//! | --- | --- |
//! | a page is damaged or cannot be read | the [judge] decides. By default the page is [poisoned]: the vCPU that accesses it leaves the guest with an error, all others run on. [`finish`] returns the number of such pages |
//! | the file system is silent | the judge is asked after each [`silence`]. By default the guest waits, and the log says so |
//! | the judge decides to stop, [`stop`], the drop of the pager | all missing pages are poisoned, so that none reads as zero. Stop the vCPUs before that |
//! | the guest or its monitor discards memory (balloon) | private memory is zero, as without a pager. Shared memory that had not arrived comes from the file |
//! | the machine migrates before all memory is there | it migrates: the migration reads all pages, and waits for those that are missing |
//! | the process forks | **Warning:** the child's memory is not armed, and missing pages read as zero there |
//!
//! # A pager in another process
//!
//! [`Armed::hand_over`] sends the descriptor and the addresses over a unix socket; the other process calls [`Armed::receive`] and
//! starts a [`Pager`] with a [`PageSource`] of its own. Keep the `Armed` in the monitor: if the other process is killed, the guest
//! waits, the socket closes, and a pager of the monitor can take over.
//!
//! [`Restore::lazy`]: crate::mapped_ram::Restore::lazy
//! [`finish`]: multifd::ram::Pager::finish
//! [`stop`]: multifd::ram::Pager::stop
//! [`silence`]: multifd::ram::PagerOptions::silence
//! [judge]: multifd::ram::PagerOptions::judge
//! [poisoned]: multifd::ram::Armed::poison
//! [digests]: crate::mapped_ram::CaptureOptions::digests
//! [`Armed::hand_over`]: multifd::ram::Armed::hand_over
//! [`Armed::receive`]: multifd::ram::Armed::receive
//! [`Pager`]: multifd::ram::Pager
//! [`PageSource`]: multifd::ram::PageSource
