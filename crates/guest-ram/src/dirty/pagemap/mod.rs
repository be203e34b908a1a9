//! The kernel's dirty logs of a process's own memory, without a virtual machine. Feature `pagemap`.
//!
//! ```text
//! any write through this process's page table ─ first to a page ─▶ page table entry
//!        ├─ write protection is lifted (userfaultfd) ─ PAGEMAP_SCAN, which protects again ──▶ PagemapLog ──┐
//!        └─ soft-dirty is set ── read with the writers standing still, then cleared ──────▶ SoftDirtyLog ──┴▶ pending
//! ```
//!
//! Use [`PagemapLog`] if possible (Linux 6.7). [`SoftDirtyLog`] is for older kernels: its bits cannot be read and
//! cleared in one step, so the writers must be paused for every take.
//!
//! Both see writes through this process's page table: by its threads, by system calls that fill its memory, by vCPUs of
//! `/dev/kvm`. Neither sees other writes: by another process that maps the same memory, through another mapping in this
//! process, or by devices that write to pages by physical address (direct I/O in progress, fixed buffers of `io_uring`,
//! VFIO). Such writers must mark what they write in a log that is [merged](super::MergedLog) with this one.
//!
//! If a block's pages are larger than the host's, a page is dirty if any part of it was written.

mod kernel;
mod soft_dirty;
mod written;

use std::{error, fmt, io, ops::Range};

use crate::{Memory, PageIndex, RamBlock};

pub use soft_dirty::SoftDirtyLog;
pub use written::PagemapLog;

/// The addresses of a block's pages, if they are sent and can be written through this process's page table. `None` for
/// an ignored block, a block in a file, memory mapped for reading, and a block without pages.
///
/// # Errors
/// If the block does not start on a boundary of a host page: it would share that page's bit with the memory before it.
fn addresses(block: &RamBlock) -> io::Result<Option<Range<u64>>> {
    let Memory::Mapped(mapping) = block.memory() else { return Ok(None) };
    let Some(pages) =
        block.slice(PageIndex(0), block.pages()).filter(|_| mapping.is_writable() && !block.is_ignored())
    else {
        return Ok(None);
    };
    let (start, len) = (pages.as_ptr().addr() as u64, pages.len() as u64);
    if len == 0 {
        return Ok(None);
    }
    let page = rustix::param::page_size() as u64;
    if !start.is_multiple_of(page) {
        let why =
            format!("expected its memory to start on a boundary of pages of {page} bytes, found {start:#x}");
        return Err(Refused::named(block, why, io::ErrorKind::InvalidInput.into()));
    }
    Ok(Some(start..start + len))
}

/// Why a log cannot be made or read. The system's error is the source.
#[derive(Debug)]
struct Refused {
    why: String,
    source: io::Error,
}

impl Refused {
    fn because(why: impl Into<String>, source: io::Error) -> io::Error {
        Self::with_kind(source.kind(), why, source)
    }

    fn with_kind(kind: io::ErrorKind, why: impl Into<String>, source: io::Error) -> io::Error {
        io::Error::new(kind, Self { why: why.into(), source })
    }

    fn named(block: &RamBlock, why: impl fmt::Display, source: io::Error) -> io::Error {
        Self::because(format!("block {:?}: {why}", block.name()), source)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl error::Error for Refused {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.source)
    }
}
