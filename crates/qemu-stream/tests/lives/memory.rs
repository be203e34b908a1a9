//! Memory of the machines of one life: new, or used before by another machine.
//!
//! UNSAFETY: memory is kept here for longer than any block on it lives, and pages are given back to the system.
#![expect(unsafe_code, reason = "memory is used again, and discarded as a balloon does")]

use std::{ptr::NonNull, sync::Arc};

use fastrand::Rng;
use multifd::ram::{Access, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, madvise},
};

use crate::plan::pick;
use crate::shadow::{What, contents, patch_offset};

/// All memory that a life has made.
#[derive(Debug, Default)]
pub(crate) struct Pool(Vec<Piece>);

#[derive(Clone, Debug)]
struct Piece {
    memory: Arc<Mapping>,
    shared: bool,
}

impl Piece {
    fn is_free(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }
}

/// What new memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Private,
    /// Like the one above, and declared to be zero where untouched.
    ZeroIfAbsent,
    /// A memfd.
    Shared,
}

impl Kind {
    pub(crate) fn any(random: &mut Rng) -> Self {
        pick(random, &[Self::Private, Self::ZeroIfAbsent, Self::ZeroIfAbsent, Self::Shared])
    }
}

impl Pool {
    /// A block, on used memory if that is requested and available.
    pub(crate) fn block(
        &mut self,
        name: &BlockName,
        length: u64,
        page_size: PageSize,
        used: bool,
        kind: Kind,
    ) -> RamBlock {
        let free = self.0.iter().find(|piece| piece.memory.len() == length && piece.is_free());
        let piece = free.filter(|_| used).cloned();
        let Piece { memory, shared } = piece.unwrap_or_else(|| {
            let shared = kind == Kind::Shared;
            let memory = if shared { memfd(length) } else { Mapping::anonymous(length).expect("memory") };
            let piece = Piece { memory: Arc::new(memory), shared };
            // So that a long life does not keep all memory that it ever had.
            if self.0.len() >= MOST_KEPT
                && let Some(at) = self.0.iter().position(Piece::is_free)
            {
                self.0.remove(at);
            }
            self.0.push(piece.clone());
            piece
        });
        let slice = memory.slice(0, usize::try_from(length).expect("small")).expect("all of it");
        let base = NonNull::new(slice.as_ptr()).expect("not null");
        // SAFETY: the memory is kept with the mapping, and no reference to it is ever made.
        let mapping = unsafe { Mapping::from_raw(base, slice.len(), memory) };
        let mapping = if kind == Kind::ZeroIfAbsent && !shared {
            // SAFETY: it is private anonymous memory, and nobody else fills in its pages.
            unsafe { mapping.assume_absent_is_zero() }
        } else {
            mapping
        };
        RamBlock::new(name.clone(), length, page_size, Memory::Mapped(mapping)).expect("a block")
    }

    /// The number of pieces that are mapped files. A mapping keeps its file open, to ask which pages exist.
    pub(crate) fn files(&self) -> usize {
        self.0.iter().filter(|piece| piece.shared).count()
    }

    /// The number of pieces of memory that are still in use.
    pub(crate) fn in_use(&self) -> usize {
        self.0.iter().filter(|piece| !piece.is_free()).count()
    }
}

/// Writes to a page of real memory.
pub(crate) fn perform(block: &RamBlock, page: u64, what: What) {
    let slice = block.slice(PageIndex(page), 1).expect("a page of the block");
    match what {
        What::Fill(tag) => {
            let mut bytes = vec![0; slice.len()];
            contents(tag, &mut bytes);
            slice.copy_from(&bytes);
        }
        What::Patch(tag) => {
            let Memory::Mapped(mapping) = block.memory() else { panic!("in memory") };
            let at = block.offset_of(PageIndex(page)).expect("in the block").0;
            let at = at + patch_offset(tag, slice.len()) as u64;
            mapping.slice(at, 8).expect("in the block").copy_from(&tag.to_be_bytes());
        }
        What::Zero => slice.clear(),
        What::Discard => {
            let discard = |how| {
                // SAFETY: only this block uses these pages, and they read as zero afterwards, as intended.
                unsafe { madvise(slice.as_ptr().cast(), slice.len(), how) }
            };
            // For shared memory this makes a hole; for other memory it is refused.
            discard(Advice::LinuxRemove).or_else(|_| discard(Advice::LinuxDontNeed)).expect("discarded");
        }
    }
}

fn memfd(length: u64) -> Mapping {
    let file = memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&file, length).expect("sized");
    Mapping::of_file(&file.into(), 0, length, Access::ReadWrite).expect("mapped")
}

const MOST_KEPT: usize = 16;
