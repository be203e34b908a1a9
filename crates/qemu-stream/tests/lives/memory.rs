//! Memory of the machines of one life: new, or used before by another.
//!
//! UNSAFETY: memory is kept here for longer than any block on it lives, and pages are given back to the system.
#![expect(unsafe_code, reason = "memory is used again, and discarded as a balloon does")]

use std::{ptr::NonNull, sync::Arc};

use multifd::ram::{BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock};
use rustix::mm::{Advice, madvise};

use crate::shadow::{What, contents, patch_offset};

/// All memory that a life has made.
#[derive(Debug, Default)]
pub(crate) struct Pool(Vec<Arc<Mapping>>);

impl Pool {
    /// A block, on memory that was used before if there is any and that is asked for. `zero_if_absent` says to the engine
    /// that untouched pages are zero, which is always true here.
    pub(crate) fn block(
        &mut self,
        name: &BlockName,
        length: u64,
        page_size: PageSize,
        used: bool,
        zero_if_absent: bool,
    ) -> RamBlock {
        let free = |memory: &&Arc<Mapping>| memory.len() == length && Arc::strong_count(memory) == 1;
        let memory = self.0.iter().find(free).filter(|_| used).cloned();
        let memory = memory.unwrap_or_else(|| {
            let memory = Arc::new(Mapping::anonymous(length).expect("memory"));
            // So that a long life does not keep all that it ever had.
            if self.0.len() >= MOST_KEPT
                && let Some(at) = self.0.iter().position(|memory| Arc::strong_count(memory) == 1)
            {
                self.0.remove(at);
            }
            self.0.push(memory.clone());
            memory
        });
        let slice = memory.slice(0, usize::try_from(length).expect("small")).expect("all of it");
        let base = NonNull::new(slice.as_ptr()).expect("not null");
        // SAFETY: the memory is kept with the mapping, and no reference to it is ever made.
        let mapping = unsafe { Mapping::from_raw(base, slice.len(), memory) };
        let mapping = if zero_if_absent {
            // SAFETY: it is private anonymous memory, and no page is filled in by anybody else.
            unsafe { mapping.assume_absent_is_zero() }
        } else {
            mapping
        };
        RamBlock::new(name.clone(), length, page_size, Memory::Mapped(mapping)).expect("a block")
    }

    /// How many pieces of memory something still uses.
    pub(crate) fn in_use(&self) -> usize {
        self.0.iter().filter(|memory| Arc::strong_count(memory) > 1).count()
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
            // SAFETY: these pages are this block's alone, and read as zero afterwards, which is what is meant.
            unsafe { madvise(slice.as_ptr().cast(), slice.len(), Advice::LinuxDontNeed) }.expect("discarded");
        }
    }
}

const MOST_KEPT: usize = 16;
