//! What is known before a pass: which pages are zero and need not be read, and that all others can be read.
//!
//! The page table and the files of guest memory are asked before the first pass, which sends everything; a later pass
//! sends pages that were written. They are asked again if there are pages that nothing may access, because the guest may
//! have unplugged memory that it had written before.

use super::ZeroPageDetection;
use crate::{
    error::Result,
    ram::{Access, PageBitmap, RamBlocks},
};

/// For each block the pages that may be nonzero, if that is known; empty if nothing was asked. To be called after the
/// dirty bits were taken: a page that is touched later has its dirty bit set.
///
/// # Errors
/// [`Error::Inaccessible`](crate::ram::Error::Inaccessible) if a pending page may not be accessed and is not known to be
/// zero. Reading it would end the process.
pub(super) fn before_pass(
    blocks: &RamBlocks,
    pending: &[PageBitmap],
    detection: ZeroPageDetection,
    is_first: bool,
) -> Result<Vec<Option<PageBitmap>>> {
    let holes = blocks.inaccessible(Access::Read);
    let is_asked = detection != ZeroPageDetection::None && (is_first || !holes.is_empty());
    let touched = if is_asked { blocks.touched() } else { Vec::new() };
    blocks.refuse_inaccessible(&holes, |block, page| {
        let may_hold = touched.get(block.0).and_then(Option::as_ref);
        pending.get(block.0).is_some_and(|pending| pending.contains(page))
            && may_hold.is_none_or(|touched| touched.contains(page))
    })?;
    Ok(touched)
}
