//! The shadow of a machine's memory: a plain copy to which every write of its guest is applied.
//!
//! The input is the writes, with the tags of their contents. The output is the first byte in which real memory differs.
//! The machine owns real memory, the life owns the shadow, and only [`contents`] is shared code.

use std::collections::BTreeMap;

use fastrand::Rng;
use multifd::ram::{PageIndex, RamBlocks};

/// The effect of a write on its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The whole page has the contents of this tag.
    Fill(u64),
    /// Eight bytes of the page are this tag.
    Patch(u64),
    /// Zeros are written.
    Zero,
    /// The page is given back to the system, as a balloon does, and is zero afterwards.
    Discard,
}

/// A write to a page of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    pub(crate) block: usize,
    pub(crate) page: u64,
    pub(crate) what: What,
}

/// The expected contents of memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shadow {
    pub(crate) page: usize,
    pub(crate) blocks: BTreeMap<String, Vec<u8>>,
    /// The device's counter: the number of pages that the guest has written.
    pub(crate) count: u64,
}

impl Shadow {
    /// Applies a write to the block with this name.
    pub(crate) fn apply(&mut self, name: &str, page: u64, what: What) {
        let start = usize::try_from(page).expect("a small block") * self.page;
        let block = self.blocks.get_mut(name).expect("a block of the machine");
        let page = &mut block[start..start + self.page];
        match what {
            What::Fill(tag) => contents(tag, page),
            What::Patch(tag) => {
                let at = patch_offset(tag, page.len());
                page[at..at + 8].copy_from_slice(&tag.to_be_bytes());
            }
            What::Zero | What::Discard => page.fill(0),
        }
    }

    /// The first difference between real memory and this.
    pub(crate) fn difference(&self, blocks: &RamBlocks) -> Option<String> {
        if self.blocks.len() != blocks.len() {
            return Some(format!("expected {} blocks, found {}", self.blocks.len(), blocks.len()));
        }
        let (mut wrong, mut first) = (0, None);
        let mut found = vec![0; self.page];
        for (_, block) in blocks.iter() {
            let name = block.name().to_string();
            let Some(expected) = self.blocks.get(&name) else {
                return Some(format!("a block {name:?} that the machine has not"));
            };
            if block.used_length() != expected.len() as u64 {
                return Some(format!("block {name:?} has another length"));
            }
            for (page, expected) in (0..).zip(expected.chunks(self.page)) {
                block.load(PageIndex(page), &mut found).expect("mapped");
                if found != expected {
                    wrong += 1;
                    first.get_or_insert_with(|| described(&name, page, expected, &found));
                }
            }
        }
        first.map(|first| format!("{first}; {wrong} pages are wrong"))
    }
}

fn described(name: &str, page: u64, expected: &[u8], found: &[u8]) -> String {
    let at = expected.iter().zip(found).position(|(expected, found)| expected != found).unwrap_or_default();
    let zero = |bytes: &[u8]| if bytes.iter().all(|byte| *byte == 0) { " (all zero)" } else { "" };
    let (expected_zero, found_zero) = (zero(expected), zero(found));
    let (expected, found) = (expected[at], found[at]);
    format!(
        "block {name:?} page {page}: byte {at:#x} is {found:#x}{found_zero}, expected {expected:#x}{expected_zero}"
    )
}

/// The contents of a tag: noise, one word repeated, zeros except for one byte, or noise and then zeros.
pub(crate) fn contents(tag: u64, page: &mut [u8]) {
    let half = page.len() / 2;
    match tag % 4 {
        0 => Rng::with_seed(tag).fill(page),
        1 => page.chunks_mut(8).for_each(|word| word.copy_from_slice(&tag.to_be_bytes()[..word.len()])),
        2 => {
            page.fill(0);
            let at = patch_offset(tag, page.len());
            if page.is_empty() {
                return;
            }
            page[at] = u8::try_from(tag >> 8 & 0xff).expect("a byte") | 1;
        }
        _ => {
            page[half..].fill(0);
            Rng::with_seed(tag).fill(&mut page[..half]);
        }
    }
}

/// The offset of a patch in a page: often at one of its ends.
pub(crate) fn patch_offset(tag: u64, page: usize) -> usize {
    if page <= 8 {
        return 0;
    }
    match tag >> 16 & 3 {
        0 => 0,
        1 => page - 8,
        _ => usize::try_from(tag >> 20 & 0xffff).expect("small") % (page - 8),
    }
}
