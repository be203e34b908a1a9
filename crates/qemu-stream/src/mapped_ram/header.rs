//! The header after a block's entry in the list.
//!
//! ```text
//! 0 u32 version 1 | 4 u64 page size | 12 u64 bitmap offset | 20 u64 pages offset | 28
//! ```

use std::io::Read;

use crate::{
    Error,
    error::{Malformed, Unsupported},
    format::{BlockEntry, Put, Reader},
};

pub(super) const LENGTH: u64 = 28;

const VERSION: u32 = 1;

/// The header as in the file; only its version is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockHeader {
    pub(super) page_size: u64,
    pub(super) bitmap_offset: u64,
    pub(super) pages_offset: u64,
}

impl BlockHeader {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(VERSION);
        out.put_u64(self.page_size);
        out.put_u64(self.bitmap_offset);
        out.put_u64(self.pages_offset);
    }

    pub(super) fn decode<R: Read>(r: &mut Reader<R>, entry: &BlockEntry) -> Result<Self, Error> {
        let version = r.u32("version of a mapped-ram header")?;
        if version > VERSION {
            let block = entry.name.clone();
            return Err(Unsupported::MappedRamVersion { block, found: version }.at(r.place()));
        }
        if version == 0 {
            let field = format!("block \"{}\": version of the mapped-ram header", entry.name);
            return Err(Malformed::value(field, "1", version).at(r.place()));
        }
        Ok(Self {
            page_size: r.u64("page size of a mapped-ram header")?,
            bitmap_offset: r.u64("bitmap offset of a mapped-ram header")?,
            pages_offset: r.u64("pages offset of a mapped-ram header")?,
        })
    }
}
