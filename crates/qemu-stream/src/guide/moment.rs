//! Save a machine as it is at one moment, with a stop of milliseconds. Feature `fault`.
//!
//! A [capture in passes](super::snapshots) is the machine as it is at the end, and stops the guest while the last pass is written.
//! [`Capture::at_moment`] protects the memory against writing, stops the guest only while its devices are saved, and copies its memory
//! after that. A page that the guest wants to write to is copied first.
//!
//! ```standalone_crate
#![doc = include_str!("code/moment.rs")]
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//! # mod snapshot { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/snapshot.rs")); }
//!
//! fn main() -> Result<()> {
//!     # use std::sync::Arc;
//!     # use multifd::{channel::Stop, ram::{BlockName, CopierError, FaultError, Mapping, Memory, PageSize, RamBlock, RamBlocks}};
//!     # use qemu_stream::mapped_ram::MomentError;
//!     # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     # let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//!     # let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//!     # let folder = std::env::temp_dir().join(format!("multifd-guide-moment-{}", std::process::id()));
//!     # std::fs::create_dir_all(&folder)?;
//!     # let path = folder.join("machine.ram");
//!     machine.run();
//!     # let saved = save_moment(&mut machine, &path);
//!     # let refused = saved.as_ref().err().and_then(|error| error.downcast_ref::<MomentError>());
//!     # if let Some(MomentError::Copier(CopierError::Fault(why @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. })))) = refused {
//!     #     std::fs::remove_dir_all(&folder)?;
//!     #     return Ok(eprintln!("{why}"));
//!     # }
//!     # let save_moment = |_: &mut Machine, _: &std::path::PathBuf| saved;
//!     let pause = save_moment(&mut machine, &path)?; // it runs again
//!     println!("the guest was stopped for {pause:?}");
//!
//!     let restored = snapshot::load(&path, &Stop::new())?;
//!     # std::fs::remove_dir_all(&folder)?;
//!     machine.halt();
//!     assert!(restored.is_whole() && machine.is_whole());
//!     assert!(restored.count <= machine.count);
//!     Ok(())
//! }
//! ```
//!
//! # Which mode when
//!
//! | | in passes ([`Migration`]) | at one moment ([`Capture::at_moment`]) |
//! | --- | --- | --- |
//! | the file contains the machine | as it is at the end | as it was at the stop, near the beginning |
//! | the guest is stopped | for the last pass, within `downtime-limit`; it grows with what the guest writes and with slow disks | while its devices are saved and what was written in the last moment is protected again; the disk does not matter |
//! | a guest that writes faster than the disk | does not converge without throttling | is copied once; it waits for the disk when [`ahead`] bytes wait to be stored |
//! | the guest between | runs at full speed, with a dirty log | waits once for each page that it writes before the page was copied |
//! | each page is written | once for each pass in which it was dirty | once |
//! | a delta ([`Capture::since`]) | yes | no: refused |
//! | needs | a dirty log that knows all writers | Linux 6.4, the privilege to serve page faults, and no writers but vCPUs and this process |
//! | the guest afterwards | is stopped: resume it, or drop it | runs |
//!
//! Use passes if the machine is to end here, if devices write by physical address (VFIO) or another process writes to the memory
//! (vhost-user), or if the process may not serve page faults. Use the other mode for regular snapshots of a machine that continues, and for
//! guests that write much. Devices need not be fast to save, but the guest is stopped until they are saved.
//!
//! # What is covered
//!
//! Writes of vCPUs (KVM), of threads of this process, and of its system calls. Not noticed are: another process that maps the same
//! memory, a second mapping, holes that are made through the descriptor of a memory file, and devices that write by physical address. **Warning:**
//! such a write changes pages that are not copied yet, and the capture has them as they are later. So shared memory is refused until
//! the embedder declares that there is no such writer ([`sole_writer`]). Memory with a dirty log of the page table (`PagemapLog`) is
//! refused, because the kernel lets only one `userfaultfd` have it.
//!
//! # What can go wrong
//!
//! | Event | What happens |
//! | --- | --- |
//! | the disk is full, or a page cannot be read | the capture fails; all memory is writable again, and the file contains no machine |
//! | the file system is silent for longer than [`silence`] | the same. Until then, a guest that writes waits once [`ahead`] bytes wait to be stored |
//! | a method of the guest fails or panics | the guest is resumed if it ran, and the capture fails |
//! | the guest or its monitor discards memory (balloon) before it was copied | the capture fails, and names the page |
//! | [`stop`] from another thread, the drop of the capture | the capture ends, the guest continues |
//!
//! [`Capture::at_moment`]: crate::mapped_ram::Capture::at_moment
//! [`Capture::since`]: crate::mapped_ram::Capture::since
//! [`Migration`]: multifd::live::Migration
//! [`ahead`]: multifd::ram::CopierOptions::ahead
//! [`silence`]: multifd::ram::CopierOptions::silence
//! [`sole_writer`]: multifd::ram::CopierOptions::sole_writer
//! [`stop`]: multifd::ram::Copier::stop
