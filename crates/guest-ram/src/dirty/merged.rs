//! Merges several dirty logs into one. In a VMM, the kernel logs the vCPUs, and device threads mark what they write.

use std::{error, fmt, io};

use super::{DirtyLog, DirtyPages};
use crate::{BlockIndex, Error, PageBitmap, RamBlocks};

/// A dirty log with the pages of all its logs.
///
/// ```
/// use guest_ram::{DirtyBitmaps, MergedLog, RamBlocks};
///
/// let blocks = RamBlocks::default();
/// let (vcpus, devices) = (DirtyBitmaps::new(&blocks), DirtyBitmaps::new(&blocks));
/// let log = MergedLog::new().with("vcpus", vcpus.reader()?).with("devices", devices.reader()?);
/// # Ok::<_, std::io::Error>(())
/// ```
///
/// Each write must be in at least one of the logs; it may be in several. Without any log a take fails with
/// [`Error::NoLogs`], because every write would be lost. For a machine that does not run, use
/// [`NeverDirty`](super::NeverDirty).
///
/// It can be moved to another thread, because each of its logs can be.
///
/// ```compile_fail,E0277
/// # use guest_ram::{MergedLog, NeverDirty, DirtyLog, DirtyPages, BlockIndex, RamBlocks, PageBitmap};
/// struct OfOneThread(std::rc::Rc<()>); // not `Send`
/// # impl DirtyLog for OfOneThread {
/// #     fn begin(&mut self, _: &RamBlocks) -> std::io::Result<()> { Ok(()) }
/// #     fn take(&mut self, _: BlockIndex, _: &mut DirtyPages<'_>) -> std::io::Result<()> { Ok(()) }
/// #     fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {}
/// # }
/// let log = MergedLog::new().with("devices", OfOneThread(std::rc::Rc::new(())));
/// ```
#[derive(Default)]
pub struct MergedLog<'a> {
    logs: Vec<(&'static str, Box<dyn DirtyLog + Send + 'a>)>,
}

impl<'a> MergedLog<'a> {
    /// Creates a merged log without any log. Pages cannot be taken from it yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `log`. Errors of this log contain `name`.
    #[must_use]
    pub fn with(mut self, name: &'static str, log: impl DirtyLog + Send + 'a) -> Self {
        self.logs.push((name, Box::new(log)));
        self
    }
}

impl DirtyLog for MergedLog<'_> {
    /// # Errors
    /// [`Error::NoLogs`] if there are no logs; otherwise the first error of a log.
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        if self.logs.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, Error::NoLogs));
        }
        for (name, log) in &mut self.logs {
            log.begin(blocks).map_err(|source| io::Error::new(source.kind(), Unreadable { name, source }))?;
        }
        Ok(())
    }

    /// # Errors
    /// The first error of a log; the bits taken before it are in `into`. [`Error::NoLogs`] if there are no logs.
    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        if self.logs.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, Error::NoLogs));
        }
        for (name, log) in &mut self.logs {
            log.take(block, into)
                .map_err(|source| io::Error::new(source.kind(), Unreadable { name, source }))?;
        }
        Ok(())
    }

    /// Puts the bits back into every log. A log may keep none of them, and a superfluous bit only costs one page.
    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        for (_, log) in &mut self.logs {
            log.put_back(block, from);
        }
    }
}

impl fmt::Debug for MergedLog<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.logs.iter().map(|(name, _)| name)).finish()
    }
}

/// The name of the log that failed.
#[derive(Debug)]
struct Unreadable {
    name: &'static str,
    source: io::Error,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the dirty log of {} cannot be read", self.name)
    }
}

impl error::Error for Unreadable {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;
    use crate::{
        BlockName, DirtyBitmaps, Mapping, Memory, NeverDirty, PageIndex, PageSize, RamBlock, RamBlocks,
    };

    const BLOCK: BlockIndex = BlockIndex(0);

    /// Compiles only if each of these can be moved to the thread that migrates.
    const _: () = {
        const fn movable<T: Send>() {}
        movable::<MergedLog<'_>>();
        movable::<crate::DirtyReader>();
        movable::<NeverDirty>();
        #[cfg(feature = "kvm")]
        movable::<crate::KvmDirtyLog<'_>>();
        #[cfg(feature = "pagemap")]
        movable::<crate::PagemapLog>();
        #[cfg(feature = "pagemap")]
        movable::<crate::SoftDirtyLog<()>>();
        #[cfg(feature = "vm-memory")]
        movable::<crate::AtomicBitmapLog>();
    };

    #[test]
    fn merged_log_is_used_by_another_thread_than_the_one_that_made_it() {
        let devices = DirtyBitmaps::new(&blocks());
        devices.mark(BLOCK, PageIndex(4));
        let mut merged = MergedLog::new().with("devices", devices.reader().expect("alone"));
        let found = std::thread::spawn(move || taken(&mut merged)).join().expect("joined");
        assert_eq!(found, 0b1_0000);
    }

    fn blocks() -> RamBlocks {
        let memory = Memory::Mapped(Mapping::anonymous(16 * 4096).expect("memory"));
        let block = RamBlock::new(BlockName::new("b").expect("a name"), 16 * 4096, PageSize::KIB_4, memory);
        RamBlocks::new(vec![block.expect("a block")]).expect("one")
    }

    fn taken(log: &mut dyn DirtyLog) -> u64 {
        let into = PageBitmap::new(16);
        log.take(BLOCK, &mut DirtyPages::new(&into)).expect("taken");
        into.words().next().expect("a word")
    }

    #[test]
    fn page_of_any_log_is_taken_once() {
        let blocks = blocks();
        let (vcpus, devices) = (DirtyBitmaps::new(&blocks), DirtyBitmaps::new(&blocks));
        let reader = |bits: &DirtyBitmaps| bits.reader().expect("alone");
        let mut of_devices = reader(&devices);
        let mut merged = MergedLog::new().with("vcpus", reader(&vcpus)).with("devices", &mut of_devices);
        vcpus.mark(BLOCK, PageIndex(1));
        assert_eq!(taken(&mut merged), 0b0010);
        drop(merged);
        devices.mark(BLOCK, PageIndex(2));
        vcpus.mark(BLOCK, PageIndex(2));
        vcpus.mark(BLOCK, PageIndex(3));
        let mut merged = MergedLog::new().with("vcpus", reader(&vcpus)).with("devices", of_devices);
        assert_eq!(taken(&mut merged), 0b1100);
        assert_eq!(taken(&mut merged), 0);
    }

    #[test]
    fn bits_put_back_are_taken_again_though_one_log_keeps_nothing() {
        let devices = DirtyBitmaps::new(&blocks()).reader().expect("alone");
        let mut merged = MergedLog::new().with("a file", NeverDirty).with("devices", devices);
        merged.put_back(BLOCK, &PageBitmap::full(16));
        assert_eq!(taken(&mut merged), 0xffff);
    }

    /// Regression: the log counted as that of a machine that does not run, and the guest's writes were lost.
    #[test]
    fn take_without_any_log_is_refused() {
        let refused =
            MergedLog::new().take(BLOCK, &mut DirtyPages::new(&PageBitmap::new(16))).expect_err("no log");
        let usage = refused.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
        assert_eq!(usage, Some(&Error::NoLogs));
    }

    #[test]
    fn no_log_at_all_is_refused() {
        let refused = MergedLog::new().begin(&blocks()).expect_err("refused").to_string();
        assert!(refused.starts_with("no dirty log was merged"), "{refused}");
    }

    #[test]
    fn log_that_cannot_be_read_is_named() {
        struct Broken;
        impl DirtyLog for Broken {
            fn begin(&mut self, _: &RamBlocks) -> io::Result<()> {
                Ok(())
            }
            fn take(&mut self, _: BlockIndex, _: &mut DirtyPages<'_>) -> io::Result<()> {
                Err(io::ErrorKind::PermissionDenied.into())
            }
            fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {}
        }
        let mut merged = MergedLog::new().with("devices", NeverDirty).with("vcpus", Broken);
        let found = merged.take(BLOCK, &mut DirtyPages::new(&PageBitmap::new(16))).expect_err("broken");
        assert_eq!(found.to_string(), "the dirty log of vcpus cannot be read");
        assert_eq!(found.kind(), io::ErrorKind::PermissionDenied);
        assert!(found.source().is_some());
    }
}
