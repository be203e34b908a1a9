//! The numbers of an incoming main stream: written by the thread that reads it, read by any other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Pages that arrived over main: all pages of a source with multifd off, zero pages of many others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MainPages {
    /// Pages with contents.
    pub normal: u64,
    /// Zero pages.
    pub zero: u64,
}

/// The numbers of one main stream.
// Relaxed throughout: only the thread that reads main writes them, and they order nothing.
#[derive(Debug, Default)]
pub(crate) struct MainCounts {
    bytes: AtomicU64,
    normal: AtomicU64,
    zero: AtomicU64,
    total: AtomicU64,
    page_size: AtomicU64,
    /// From 1; 0 is unknown.
    pass: AtomicU64,
    paused: AtomicBool,
}

impl MainCounts {
    pub(super) fn set_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// Counts a page with contents.
    pub(super) fn add_normal(&self) {
        add_one(&self.normal);
    }

    /// Counts a zero page.
    pub(super) fn add_zero(&self) {
        add_one(&self.zero);
    }

    pub(super) fn set_ram(&self, total: u64, page_size: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.page_size.store(page_size, Ordering::Relaxed);
    }

    pub(super) fn set_pass(&self, pass: Option<u64>) {
        self.pass.store(pass.unwrap_or(0), Ordering::Relaxed);
    }

    /// Whether the source has switched to post-copy, and its connection is broken.
    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn pages(&self) -> MainPages {
        MainPages { normal: self.normal.load(Ordering::Relaxed), zero: self.zero.load(Ordering::Relaxed) }
    }

    /// The length of RAM and of a page.
    pub(crate) fn ram(&self) -> Option<(u64, u64)> {
        let page_size = self.page_size.load(Ordering::Relaxed);
        (page_size > 0).then(|| (self.total.load(Ordering::Relaxed), page_size))
    }

    pub(crate) fn pass(&self) -> Option<u64> {
        Some(self.pass.load(Ordering::Relaxed)).filter(|pass| *pass > 0)
    }
}

/// Adds 1. Only one thread writes, so a load and a store are enough.
fn add_one(count: &AtomicU64) {
    count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}
