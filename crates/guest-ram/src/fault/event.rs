//! What the kernel reports about armed memory.

use std::ops::Range;

use linux_raw_sys::general as sys;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::{BlockIndex, BlockOffset};

use super::Region;

/// Something that happened to armed memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultEvent {
    /// A thread waits for a page.
    Fault {
        /// The block.
        block: BlockIndex,
        /// The first byte of the host page.
        offset: BlockOffset,
        /// What it waits for.
        kind: FaultKind,
        /// Whether it is about to write.
        write: bool,
        /// The thread's number (`gettid`) in its own namespace, if the kernel [names](super::Features::THREAD) it.
        thread: Option<u32>,
    },
    /// Memory was discarded: `MADV_DONTNEED`, `MADV_FREE` or `MADV_REMOVE`.
    Removed {
        /// The block.
        block: BlockIndex,
        /// The first byte.
        offset: BlockOffset,
        /// The number of bytes.
        len: u64,
    },
}

/// Why a thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// There is no page.
    Missing,
    /// The page is protected against writing.
    Protected,
    /// The page is in the file and not in the page table.
    Minor,
}

/// A message of the kernel.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Message {
    event: u8,
    reserved_1: u8,
    reserved_2: u16,
    reserved_3: u32,
    argument: [u64; 3],
}

const _: () = assert!(size_of::<Message>() == size_of::<sys::uffd_msg>());

impl Message {
    /// A message to be filled.
    pub(super) fn empty() -> Self {
        Self::new_zeroed()
    }

    /// Adds what the message says about these regions. Memory outside of them is not armed by this library.
    pub(super) fn read(&self, regions: &[Region], events: &mut Vec<FaultEvent>) {
        let [first, second, third] = self.argument;
        match u32::from(self.event) {
            sys::UFFD_EVENT_PAGEFAULT => {
                let at = |region: &&Region| region.addresses.contains(&second);
                let Some(region) = regions.iter().find(at) else {
                    tracing::warn!(
                        address = format_args!("{second:#x}"),
                        "a page fault outside the armed memory"
                    );
                    return;
                };
                let offset = second - region.addresses.start;
                events.push(FaultEvent::Fault {
                    block: region.block,
                    offset: BlockOffset(offset - offset % region.host_page),
                    kind: if first & u64::from(sys::UFFD_PAGEFAULT_FLAG_WP) != 0 {
                        FaultKind::Protected
                    } else if first & u64::from(sys::UFFD_PAGEFAULT_FLAG_MINOR) != 0 {
                        FaultKind::Minor
                    } else {
                        FaultKind::Missing
                    },
                    write: first & u64::from(sys::UFFD_PAGEFAULT_FLAG_WRITE) != 0,
                    thread: thread_of(third),
                });
            }
            sys::UFFD_EVENT_REMOVE => {
                let removed = first..second;
                for region in regions {
                    let Range { start, end } = region.addresses;
                    let (from, to) = (removed.start.max(start), removed.end.min(end));
                    if from < to {
                        let offset = BlockOffset(from - start);
                        events.push(FaultEvent::Removed { block: region.block, offset, len: to - from });
                    }
                }
            }
            event => tracing::warn!(event, "an event of userfaultfd that was not asked for"),
        }
    }
}

/// The thread of a page fault. The kernel fills the first four bytes; no thread has the number 0.
fn thread_of(argument: u64) -> Option<u32> {
    let (thread, _) = u32::read_from_prefix(argument.as_bytes()).ok()?;
    Some(thread).filter(|thread| *thread != 0)
}

/// How many messages are read at once.
pub(super) const MESSAGES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockName, MemoryKind};

    fn message(event: u32, argument: [u64; 3]) -> Message {
        let event = u8::try_from(event).expect("small");
        Message { event, argument, ..Message::empty() }
    }

    #[test]
    fn messages_are_about_host_pages_of_blocks() {
        let region = |block, start: u64, host_page| Region {
            block: BlockIndex(block),
            name: BlockName::new("b").expect("a name"),
            addresses: start..start + (4 << 20),
            host_page,
            kind: MemoryKind::Anonymous,
            page: 4096,
            pages: 1024,
        };
        let regions = [region(0, 16 << 20, 4096), region(2, 20 << 20, 2 << 20)];
        let mut events = Vec::new();
        let mut read = |event, argument| message(event, argument).read(&regions, &mut events);
        read(sys::UFFD_EVENT_PAGEFAULT, [1, (16 << 20) + 4097, 0]);
        read(sys::UFFD_EVENT_PAGEFAULT, [2, (22 << 20) + 5, 0]);
        read(sys::UFFD_EVENT_PAGEFAULT, [0, 24 << 20, 0]);
        read(sys::UFFD_EVENT_REMOVE, [0, u64::MAX, 0]);
        read(sys::UFFD_EVENT_REMOVE, [0, 16 << 20, 0]);
        read(sys::UFFD_EVENT_FORK, [7, 0, 0]);
        let fault = |block, offset, kind, write| FaultEvent::Fault {
            block: BlockIndex(block),
            offset: BlockOffset(offset),
            kind,
            write,
            thread: None,
        };
        let removed =
            |block| FaultEvent::Removed { block: BlockIndex(block), offset: BlockOffset(0), len: 4 << 20 };
        let expected = [
            fault(0, 4096, FaultKind::Missing, true),
            fault(2, 2 << 20, FaultKind::Protected, false),
            removed(0),
            removed(2),
        ];
        assert_eq!(events, expected);
        let mut argument = u64::MAX;
        argument.as_mut_bytes()[..4].copy_from_slice(7_u32.as_bytes());
        assert_eq!((thread_of(argument), thread_of(0)), (Some(7), None));
    }
}
