//! The records of the RAM section: `u64`, flags in the bits below the page size, the rest an offset.
//!
//! ```text
//! ZERO | page     [name] u8 0               PAGE | page   [name] page
//! XBZRLE | page   [name] u8 1, u16 length, delta
//! EOS                                       MULTIFD_FLUSH
//! ```
//!
//! The counted name is present unless CONTINUE is set. It remains the current block, across sections.

use std::io::Read;

use multifd::ram::{BlockIndex, BlockOffset, PageIndex};

use super::{BlockList, Put, Reader, blocks::MEM_SIZE};
use crate::error::{Error, Malformed, Unsupported, Usage, Violation};

const ZERO: u64 = 0x2;
const PAGE: u64 = 0x8;
const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;
const XBZRLE: u64 = 0x40;
const HOOK: u64 = 0x80;
const COMPRESS_PAGE: u64 = 0x100;
const MULTIFD_FLUSH: u64 = 0x200;
// 0x1 (FULL) was never sent and is refused like any unknown flag.

const XBZRLE_ENCODING: u8 = 1;
const ZERO_FILL: u8 = 0;

/// One record of the RAM section, checked against the block list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The page is zero.
    Zero(BlockIndex, PageIndex),
    /// The page's bytes follow.
    Page(BlockIndex, PageIndex),
    /// A delta against the page's last contents; this number of bytes follows.
    Xbzrle(BlockIndex, PageIndex, u16),
    /// All channels must reach their next SYNC.
    MultifdFlush,
    /// The end of the section's body.
    Eos,
}

/// The block that the next record may continue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CurrentBlock(Option<BlockIndex>);

impl Record {
    /// Decodes a record, but not the bytes of a page or a delta.
    ///
    /// # Errors
    /// If its kind is unknown or not supported, it lies outside its block, or the stream ends early.
    pub fn decode<R: Read>(
        r: &mut Reader<R>,
        blocks: &BlockList,
        current: &mut CurrentBlock,
    ) -> Result<Self, Error> {
        let head = r.u64("a ram record")?;
        let at = r.place();
        let flags = head & (blocks.page_size().bytes() as u64 - 1);
        let offset = BlockOffset(head - flags);
        let kind = flags & !CONTINUE;
        match kind {
            EOS | MULTIFD_FLUSH => {
                if head != kind {
                    let field = "ram record without a page";
                    return Err(Malformed::value(field, "no offset and no CONTINUE", head).at(at));
                }
                return Ok(if kind == EOS { Self::Eos } else { Self::MultifdFlush });
            }
            ZERO | PAGE | XBZRLE => {}
            MEM_SIZE => {
                let (record, place) = ("MEM_SIZE", "after the block list");
                return Err(Violation::Misplaced { record, place }.at(at));
            }
            HOOK => {
                let (what, capability) = ("ram record HOOK (0x80)", "rdma-pin-all (and the rdma transport)");
                return Err(Unsupported::Capability { what, capability }.at(at));
            }
            COMPRESS_PAGE => {
                let (what, capability) = ("ram record COMPRESS_PAGE (0x100)", "compress");
                return Err(Unsupported::Capability { what, capability }.at(at));
            }
            _ => return Err(Malformed::RecordFlags { flags }.at(at)),
        }
        let (block, page) = locate(r, blocks, current, flags & CONTINUE != 0, offset)?;
        match kind {
            ZERO => {
                let fill = r.u8("fill byte of a ZERO record")?;
                if fill != ZERO_FILL {
                    return Err(Malformed::value("fill byte of a ZERO record", "0", fill).at(r.place()));
                }
                Ok(Self::Zero(block, page))
            }
            PAGE => Ok(Self::Page(block, page)),
            _ => {
                let encoding = r.u8("encoding of an XBZRLE record")?;
                if encoding != XBZRLE_ENCODING {
                    return Err(Malformed::value("encoding of an XBZRLE record", "1", encoding).at(r.place()));
                }
                let length = r.u16("length of an XBZRLE record")?;
                let max = blocks.page_size().bytes() as u64;
                if u64::from(length) > max {
                    let field = "length of an XBZRLE record";
                    return Err(Malformed::too_long(field, max, length.into()).at(r.place()));
                }
                Ok(Self::Xbzrle(block, page, length))
            }
        }
    }

    /// Appends the record; the caller appends the bytes of a page or a delta. The name is omitted if the record before
    /// has set it.
    ///
    /// # Errors
    /// If the list has no such page.
    pub fn encode(
        &self,
        blocks: &BlockList,
        current: &mut CurrentBlock,
        out: &mut Vec<u8>,
    ) -> Result<(), Usage> {
        let mut page_record = |kind: u64, block: BlockIndex, page: PageIndex| {
            let entry = blocks.entry(block).zip(blocks.offset_of(block, page));
            let (entry, offset) = entry.ok_or(Usage::NoSuchPage { block: block.0, page: page.0 })?;
            if current.0.replace(block) == Some(block) {
                out.put_u64(offset.0 | kind | CONTINUE);
            } else {
                out.put_u64(offset.0 | kind);
                out.put_name(&entry.name);
            }
            Ok::<(), Usage>(())
        };
        match *self {
            Self::Zero(block, page) => {
                page_record(ZERO, block, page)?;
                out.put_u8(ZERO_FILL);
            }
            Self::Page(block, page) => page_record(PAGE, block, page)?,
            Self::Xbzrle(block, page, length) => {
                page_record(XBZRLE, block, page)?;
                out.put_u8(XBZRLE_ENCODING);
                out.put_u16(length);
            }
            Self::MultifdFlush => out.put_u64(MULTIFD_FLUSH),
            Self::Eos => out.put_u64(EOS),
        }
        Ok(())
    }
}

fn locate<R: Read>(
    r: &mut Reader<R>,
    blocks: &BlockList,
    current: &mut CurrentBlock,
    continued: bool,
    offset: BlockOffset,
) -> Result<(BlockIndex, PageIndex), Error> {
    let at = r.place();
    let block = if continued {
        current.0.ok_or_else(|| Violation::NoCurrentBlock.at(at))?
    } else {
        let name = r.block_name("block of a ram record")?;
        blocks.position(&name).ok_or_else(|| Violation::UnknownBlock(name).at(at))?
    };
    current.0 = Some(block);
    let page = blocks.page_size().page_at(offset);
    match (page.filter(|page| blocks.offset_of(block, *page).is_some()), blocks.entry(block)) {
        (Some(page), _) => Ok((block, page)),
        (None, entry) => {
            let block = entry.map(|entry| (entry.name.clone(), entry.used_length));
            let (block, used_length) = block.ok_or_else(|| Violation::NoCurrentBlock.at(at))?;
            Err(Violation::PageOutside { block, offset, used_length }.at(at))
        }
    }
}

#[cfg(test)]
mod tests;
