//! The options of post-copy.

use std::time::Duration;

use multifd::{
    channel::{Context, Stop},
    parameters::{CONNECT_TIMEOUT, STALL_TIMEOUT},
    postcopy::Shape,
    ram::{BlockName, PageBitmap, PageIndex, PageSize},
};

use crate::{
    error::Usage,
    format::{BlockEntry, BlockList, PageSizes},
    outgoing::options::END,
};

/// The options of a [`PostcopySource`](super::PostcopySource). The defaults work with every destination that has capability
/// `postcopy-ram` on.
#[derive(Clone, Debug)]
#[must_use]
pub struct PostcopyOptions {
    pub(super) preempt: bool,
    pub(super) walk_limit: Option<u64>,
    pub(super) connect_timeout: Duration,
    pub(super) stall_timeout: Option<Duration>,
    pub(super) end_timeout: Option<Duration>,
    host_page_size: Option<u64>,
    host_page_sizes: Vec<(BlockName, u64)>,
}

impl Default for PostcopyOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl PostcopyOptions {
    /// Creates the options.
    pub fn new() -> Self {
        Self {
            preempt: false,
            walk_limit: None,
            connect_timeout: CONNECT_TIMEOUT.default_time(),
            stall_timeout: Some(STALL_TIMEOUT.default_time()),
            end_timeout: Some(END),
            host_page_size: None,
            host_page_sizes: Vec::new(),
        }
    }

    /// Whether requested pages have a connection of their own (capability `postcopy-preempt`, which must be on at the
    /// destination: QEMU 7.2 and later). They do not wait behind other pages then. Default off. For a guest that has run here it
    /// needs [multifd off](crate::source::SourceOptions::channels): of several channels, one has only requested pages anyway.
    pub fn preempt(mut self, on: bool) -> Self {
        self.preempt = on;
        self
    }

    pub(crate) fn has_preempt(&self) -> bool {
        self.preempt
    }

    /// What the connections of post-copy are made with.
    pub(crate) fn context(&self, stop: &Stop) -> Context {
        let context = Context::new(stop).connect_timeout(self.connect_timeout);
        // Small buffers: a request waits behind what is in them.
        context.stall_timeout(self.stall_timeout).channels(u8::MAX)
    }

    /// Limits pages that nobody requests to this number of bytes in a second (`max-postcopy-bandwidth`). Requests have no
    /// limit. Default `None`: no limit, and so is 0. [`PostcopyControl`](super::PostcopyControl) changes it later.
    pub fn max_postcopy_bandwidth(mut self, bytes: Option<u64>) -> Self {
        self.walk_limit = bytes;
        self
    }

    /// The time limit for establishing a connection, TLS handshake included. Default 30 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How long the destination may read nothing while there is something to send, or not reply where it must. Default 120 s;
    /// `None` is no limit.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// The time limit for the destination to report that it has everything, after everything was sent. Default 600 s; `None` is
    /// no limit.
    pub fn end_timeout(mut self, limit: Option<Duration>) -> Self {
        self.end_timeout = limit;
        self
    }

    /// The page size of the destination's system, in bytes, a power of two. Default: the page size of the machine.
    pub fn host_page_size(mut self, bytes: u64) -> Self {
        self.host_page_size = Some(bytes);
        self
    }

    /// The size of the host pages behind one block at the destination, in bytes, a power of two: `0x200000` for a
    /// `memory-backend` in huge pages of 2 MiB. The destination refuses another size.
    pub fn block_page_size(mut self, block: BlockName, bytes: u64) -> Self {
        self.host_page_sizes.push((block, bytes));
        self
    }

    /// The page size of the destination's system.
    pub(super) fn system(&self, page_size: PageSize) -> u64 {
        self.host_page_size.unwrap_or(page_size.bytes() as u64)
    }

    /// The number of pages in a host page of a block.
    pub(super) fn host_page(&self, entry: &BlockEntry, page_size: PageSize) -> u64 {
        let bytes = entry.host_page_size.unwrap_or_else(|| self.system(page_size));
        (bytes / page_size.bytes() as u64).max(1)
    }

    /// The page sizes to announce to the destination.
    pub(crate) fn page_sizes(&self, page_size: PageSize) -> PageSizes {
        let own = self.host_page_sizes.iter().map(|(_, bytes)| *bytes);
        let host = own.fold(self.system(page_size), |all, bytes| all | bytes);
        PageSizes { host, target: page_size.bytes() as u64 }
    }

    /// The pages that the destination keeps: all but those that are lacking, and only whole host pages.
    pub(in crate::outgoing) fn kept(&self, list: &BlockList, lacking: &[PageBitmap]) -> Vec<PageBitmap> {
        let kept = list.entries().iter().zip(lacking).map(|(entry, lacking)| {
            let keep = PageBitmap::full(lacking.pages());
            let host_page = self.host_page(entry, list.page_size());
            let shape = Shape { pages: lacking.pages(), host_page };
            for (first, count) in lacking.set_runs() {
                let (first, count) = shape.whole(first.0, count);
                keep.clear_run(PageIndex(first), count);
            }
            keep
        });
        kept.collect()
    }

    /// The list with the host page sizes.
    ///
    /// # Errors
    /// If a size is no power of two, less than a page, or that of an unknown block.
    pub(in crate::outgoing) fn list(&self, list: &BlockList) -> Result<BlockList, Usage> {
        let refused = |why: String| Usage::Value { what: "host page size", why };
        let page_size = list.page_size();
        let system = self.system(page_size);
        let least = page_size.bytes() as u64;
        if !system.is_power_of_two() || system < least {
            return Err(refused(format!("expected a power of two, at least {least:#x}, found {system:#x}")));
        }
        let mut entries = list.entries().to_vec();
        for (name, bytes) in &self.host_page_sizes {
            let entry = entries.iter_mut().find(|entry| entry.name == *name);
            let entry = entry.ok_or_else(|| refused(format!("there is no block \"{name}\"")))?;
            entry.host_page_size = (*bytes != system).then_some(*bytes);
        }
        BlockList::new(entries, page_size)
    }
}
