//! Which pages were written: the dirty log.
//!
//! A migration sends every page once while the guest runs, and from then on those that the log names. **A write that
//! no log has is missing at the destination, and nothing will tell.** So list everything that writes to guest memory,
//! and find each a log:
//!
//! | What writes | Log | Feature |
//! | --- | --- | --- |
//! | vCPUs of `/dev/kvm` | `KvmDirtyLog`, the bitmaps of the memory slots | `kvm` |
//! | the same, where a vCPU writes little of much memory | `KvmRingLog`, a ring for each vCPU | `kvm` |
//! | devices that go through `vm-memory` | `AtomicBitmapLog`, on a `GuestMemoryMmap<AtomicBitmap>` | `vm-memory` |
//! | any threads of your own, and vCPUs | `PagemapLog`, from the page table (Linux 6.7) | `pagemap` |
//! | anything that can say so | [`DirtyBitmaps`](multifd::ram::DirtyBitmaps), marked after the write | |
//! | another process (vhost-user) | what it reports, marked in a [`DirtyBitmaps`](multifd::ram::DirtyBitmaps) | |
//! | nothing: the guest stands | [`NeverDirty`](multifd::ram::NeverDirty) | |
//!
//! Several are merged. Here the guest's CPU has one log and its disk another:
//!
//! ```
//! use multifd::ram::{BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, MergedLog, PageBitmap, PageIndex, RamBlocks};
//! # use multifd::ram::{BlockName, Mapping, Memory, PageSize, RamBlock};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//! # let name = BlockName::new("ram").ok_or("a name")?;
//! # let blocks = RamBlocks::new(vec![RamBlock::new(name, 1 << 20, PageSize::KIB_4, memory)?])?;
//! let (cpu, disk) = (DirtyBitmaps::new(&blocks), DirtyBitmaps::new(&blocks)); // clones share their bits
//! let mut log = MergedLog::new().with("the CPU", cpu.reader()?).with("the disk", disk.reader()?);
//!
//! let ram = blocks.block(BlockIndex(0))?;
//! ram.slice(PageIndex(9), 1).ok_or("mapped")?.copy_from(&[1; 4096]);
//! disk.mark(BlockIndex(0), PageIndex(9)); // after the write: a bit that is taken before it would be one too few
//! cpu.mark(BlockIndex(0), PageIndex(2));
//!
//! // What a pass does: the bits are taken and forgotten in one step.
//! let dirty = PageBitmap::new(ram.pages());
//! log.take(BlockIndex(0), &mut DirtyPages::new(&dirty))?;
//! assert!(dirty.contains(PageIndex(9)) && dirty.contains(PageIndex(2)) && dirty.count() == 2);
//! dirty.forget();
//! log.take(BlockIndex(0), &mut DirtyPages::new(&dirty))?;
//! assert_eq!(dirty.count(), 0);
//! # Ok(())
//! # }
//! ```
//!
//! # When a log is on
//!
//! The logs of the kernel cost the guest a fault for each page between two takes. They are on from the call that
//! makes them to their drop: make them for one migration, before [`Migration::run`](multifd::live::Migration::run),
//! and let them go when it returns. What was written before does not matter, for the first pass sends everything.
//!
//! # After the stop
//!
//! The log is taken once more when [`Guest::stop`](multifd::live::Guest::stop) has returned. Everything written by
//! then has to be in it: wait for requests under way (asynchronous I/O, vhost), have vCPUs leave `KVM_RUN`, mark what
//! was not marked yet. What is written later is in no pass: the log is asked once more behind the last one, and a page in it
//! fails the migration.
//!
//! # One reader
//!
//! A log is read by one migration or capture at a time, since each would miss what the other takes. Marking is for many
//! ([`DirtyBitmaps`](multifd::ram::DirtyBitmaps) is cloned at will), reading is for one: a second
//! [`reader`](multifd::ram::DirtyBitmaps::reader) is refused, and so are a second log of KVM's or `vm-memory`'s bitmaps.
//! **Warning:** a VMM that takes the same bits by other ways, for snapshots of its own, still makes a migration lose pages.
//!
//! # A log of your own
//!
//! Implement [`DirtyLog`](multifd::ram::DirtyLog): `begin` compares the blocks with those it was made for
//! ([`Identity`](multifd::ram::Identity)), `take` moves bits out, `put_back` takes those of a failed
//! migration in again. A write that happens during `take` must be found by it or by the next one. Test it by writing
//! each page once while the log is taken in a loop, and looking at the end whether one was missed; that is how the
//! ones here are tested.
