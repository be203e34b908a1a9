//! Converts the bytes that a log reports to the pages of a block that contain them.

use std::ops::Range;

use crate::{PageBitmap, PageIndex, PageSize};

/// Sets the bits of all pages that contain one of `bytes`, counted from the block's start. Bytes beyond the last page
/// are ignored.
pub(crate) fn mark(into: &PageBitmap, page_size: PageSize, bytes: Range<u64>) {
    let page = page_size.bytes() as u64;
    let (first, end) = (bytes.start / page, bytes.end.div_ceil(page).min(into.pages()));
    if !bytes.is_empty() && first < end {
        into.set_run(PageIndex(first), end - first);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_page_is_marked_if_and_only_if_one_of_the_bytes_is_in_it(
            pages in 1_u64..100,
            page_bits in 12_u32..17,
            first in 0_u64..100,
            count in 0_u64..100,
        ) {
            let page_size = PageSize::from_bits(page_bits).expect("in range");
            let (into, page) = (PageBitmap::new(pages), page_size.bytes() as u64);
            let bytes = first * 4096..(first + count) * 4096;
            mark(&into, page_size, bytes.clone());
            for at in 0..pages {
                let touched = !bytes.is_empty() && bytes.start < (at + 1) * page && bytes.end > at * page;
                prop_assert_eq!(into.contains(PageIndex(at)), touched, "page {}", at);
            }
        }
    }
}
