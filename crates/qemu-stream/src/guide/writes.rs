//! Which pages were written: the dirty log.
//!
//! A migration sends every page once while the guest runs, and after that the pages that the log reports. **Warning: a write
//! that no log reports is missing at the destination, without an error.** List everything that writes to guest memory, and
//! choose a log for each:
//!
//! | What writes | Log | Feature |
//! | --- | --- | --- |
//! | vCPUs of `/dev/kvm` | `KvmDirtyLog`, the bitmaps of the memory slots | `kvm` |
//! | the same, if vCPUs write to a small part of a large memory | `KvmRingLog`, a ring for each vCPU | `kvm` |
//! | devices that go through `vm-memory` | `AtomicBitmapLog`, on a `GuestMemoryMmap<AtomicBitmap>` | `vm-memory` |
//! | any threads of your own, and vCPUs | `PagemapLog`, from the page table (Linux 6.7) | `pagemap` |
//! | anything that can report its writes | [`DirtyBitmaps`](multifd::ram::DirtyBitmaps), marked after the write | |
//! | another process (vhost-user) | what it reports, marked in a [`DirtyBitmaps`](multifd::ram::DirtyBitmaps) | |
//! | nothing: the guest is stopped | [`NeverDirty`](multifd::ram::NeverDirty) | |
//!
//! Several logs are merged. Here the guest's CPU has one log and its disk another:
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
//! disk.mark(BlockIndex(0), PageIndex(9)); // after the write: a mark before it could be taken too early
//! cpu.mark(BlockIndex(0), PageIndex(2));
//!
//! // What a pass does: it reads and clears the bits in one step.
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
//! The logs of the kernel cost the guest one fault for each page between two takes. They are active from their creation to
//! their drop. Create them for one migration, before [`Migration::run`](multifd::live::Migration::run), and drop them when it
//! returns. Earlier writes do not matter, because the first pass sends everything.
//!
//! # After the stop
//!
//! The log is taken once more after [`Guest::stop`](multifd::live::Guest::stop) has returned. All writes up to then must be in
//! it: wait for pending requests (asynchronous I/O, vhost), make vCPUs leave `KVM_RUN`, mark what is not marked yet. Later
//! writes are in no pass. The log is therefore read again after the last pass; if it reports a page, the migration fails.
//!
//! # One reader
//!
//! Only one migration or capture may read a log at a time, because each would miss the bits that the other takes. Many threads
//! may mark pages ([`DirtyBitmaps`](multifd::ram::DirtyBitmaps) can be cloned). A second
//! [`reader`](multifd::ram::DirtyBitmaps::reader) is refused, and so is a second log of KVM's or `vm-memory`'s bitmaps.
//! **Warning:** if the VMM takes the same bits in another way, for example for its own snapshots, a migration loses pages.
//!
//! # A log of your own
//!
//! Implement [`DirtyLog`](multifd::ram::DirtyLog): `begin` compares the blocks with those that the log was created for
//! ([`Identity`](multifd::ram::Identity)), `take` moves the bits out, `put_back` returns the bits of a failed migration. A
//! write during `take` must be reported by this `take` or by the next one. To test it, write each page once while the log is
//! taken in a loop, and check at the end that no page is missing. The logs of this library are tested in the same way.
