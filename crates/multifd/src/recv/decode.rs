//! Decodes the head of a packet: its block and its pages.
//!
//! Input is the bytes of a head. Output is the pages that the channel may write: each of them lies inside a block that the
//! source has announced. The lists belong to the channel and are reused for every packet.

#[cfg(feature = "_codec")]
use crate::wire::limits::PAYLOAD_BYTES;
use crate::{
    compress::Method,
    error::{Error, Malformed, Result, Violation},
    ram::{BlockIndex, BlockName, BlockOffset, PageIndex, PageSize, RamBlock, RamBlocks},
    sync_types::OnceLock,
    wire::{Packet, Pages, limits::packet_pages},
};

/// The contents of one packet's head.
pub(super) struct Listed {
    pub(super) packet_num: u64,
    pub(super) sync: bool,
    pub(super) payload_len: usize,
    /// How the payload is compressed.
    pub(super) method: Method,
    pub(super) block: BlockIndex,
    pub(super) normal: Vec<PageIndex>,
    pub(super) zero: Vec<PageIndex>,
    page_size: PageSize,
}

impl Listed {
    pub(super) fn new(page_size: PageSize) -> Self {
        let room = packet_pages(page_size);
        Self {
            packet_num: 0,
            sync: false,
            payload_len: 0,
            method: Method::None,
            block: BlockIndex(0),
            normal: Vec::with_capacity(room),
            zero: Vec::with_capacity(room),
            page_size,
        }
    }

    pub(super) fn has_pages(&self) -> bool {
        !self.normal.is_empty() || !self.zero.is_empty()
    }

    /// Decodes a head. `blocks` are the blocks that the source has announced so far; `method` is the configured method, or
    /// that of the migration's first packet with pages.
    pub(super) fn decode(
        &mut self,
        head: &[u8],
        method: &OnceLock<Method>,
        blocks: Option<&RamBlocks>,
    ) -> Result<()> {
        self.normal.clear();
        self.zero.clear();
        let packet = Packet::decode(head, self.page_size)?;
        self.packet_num = packet.packet_num;
        self.sync = packet.is_sync();
        self.payload_len = 0;
        if !packet.lists_pages() {
            return Ok(());
        }
        self.method = match method.get() {
            Some(method) => *method,
            None => {
                let named = Method::of(packet.flags)?;
                *method.get_or_init(|| named)
            }
        };
        self.method.check(packet.flags)?;
        let blocks = blocks.ok_or(Violation::PagesBeforeBlocks)?;
        let block = self.find(&packet, blocks)?;
        inside(block, packet.normal(), &mut self.normal)?;
        inside(block, packet.zero(), &mut self.zero)?;
        self.payload_len = self.payload(&packet)?;
        Ok(())
    }

    /// The packet's block. Most packets have the same block as the one before.
    fn find<'b>(&mut self, packet: &Packet<'_>, blocks: &'b RamBlocks) -> Result<&'b RamBlock> {
        let last = blocks.get(self.block).filter(|block| block.name().as_bytes() == packet.block);
        if let Some(block) = last {
            return Ok(block);
        }
        self.block = blocks.find(packet.block).ok_or_else(|| unknown(packet.block))?;
        Ok(blocks.block(self.block)?)
    }

    fn payload(&self, packet: &Packet<'_>) -> Result<usize, Malformed> {
        let (pages, page_size, found) = (self.normal.len(), self.page_size, packet.payload_len);
        let plain = (pages * page_size.bytes()) as u64;
        let fits = match self.method {
            Method::None => u64::from(found) == plain,
            // Only a compressed payload has a length of its own, which has a lower and an upper bound.
            #[cfg(feature = "_codec")]
            _ if pages == 0 => found == 0,
            #[cfg(feature = "_codec")]
            _ => {
                if !(1..=PAYLOAD_BYTES).contains(&found) {
                    return Err(Malformed::CompressedSize { most: PAYLOAD_BYTES, found });
                }
                true
            }
        };
        if !fits {
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            return Err(Malformed::PayloadSize { expected: plain, found, pages, page_size });
        }
        Ok(found as usize)
    }
}

/// Copies the list of pages and checks that the block has each of them.
fn inside(block: &RamBlock, pages: Pages<'_>, listed: &mut Vec<PageIndex>) -> Result<(), Violation> {
    for page in pages {
        if page.0 >= block.pages() {
            let offset = block.page_size().offset_of(page).unwrap_or(BlockOffset(u64::MAX));
            let (name, used_length) = (block.name().clone(), block.used_length());
            return Err(Violation::OutsideBlock { offset, name, used_length });
        }
        listed.push(page);
    }
    Ok(())
}

fn unknown(name: &[u8]) -> Error {
    match BlockName::new(name) {
        Some(name) => Violation::UnknownBlock { name }.into(),
        None => Malformed::NoBlockName.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ram::{Mapping, Memory},
        wire::{Flags, HeadBuffer},
    };

    fn blocks() -> RamBlocks {
        let block = |name: &str, used_length| {
            let memory = Memory::Mapped(Mapping::anonymous(used_length).expect("memory"));
            let name = BlockName::new(name).expect("a name");
            RamBlock::new(name, used_length, PageSize::KIB_4, memory).expect("a block")
        };
        RamBlocks::new(vec![block("pc.ram", 0x40000), block("small", 100), block("empty", 0)])
            .expect("distinct")
    }

    fn decode(name: &str, flags: u32, normal: &[u64], zero: &[u64], payload: u32) -> Result<Listed> {
        let pages = |list: &[u64]| list.iter().copied().map(PageIndex).collect::<Vec<_>>();
        let mut head = HeadBuffer::new(PageSize::KIB_4);
        let name = BlockName::new(name).expect("a name");
        let bytes = head.pages(Flags(flags), 0, &name, &pages(normal), &pages(zero), payload);
        let mut listed = Listed::new(PageSize::KIB_4);
        listed.decode(bytes, &OnceLock::from(Method::None), Some(&blocks())).map(|()| listed)
    }

    fn refusal(name: &str, flags: u32, normal: &[u64], zero: &[u64], payload: u32) -> String {
        decode(name, flags, normal, zero, payload).err().expect("refused").to_string()
    }

    #[test]
    fn pages_of_the_block_are_listed_and_the_first_one_past_its_end_is_refused() {
        let listed = decode("pc.ram", 0, &[0, 63], &[5], 8192).expect("valid");
        assert_eq!((listed.normal.len(), listed.zero.len(), listed.payload_len), (2, 1, 8192));
        assert_eq!(
            refusal("pc.ram", 0, &[64], &[], 4096),
            r#"offset 0x40000 outside block "pc.ram" (0x40000)"#
        );
        assert_eq!(refusal("pc.ram", 0, &[], &[64], 0), r#"offset 0x40000 outside block "pc.ram" (0x40000)"#);
        let far = (1 << 52) - 1;
        assert_eq!(
            refusal("pc.ram", 0, &[far], &[], 4096),
            r#"offset 0xfffffffffffff000 outside block "pc.ram" (0x40000)"#
        );
    }

    #[test]
    fn a_block_smaller_than_a_page_takes_none() {
        assert_eq!(refusal("small", 0, &[0], &[], 4096), r#"offset 0x0 outside block "small" (0x64)"#);
        assert_eq!(refusal("empty", 0, &[], &[0], 0), r#"offset 0x0 outside block "empty" (0x0)"#);
    }

    #[test]
    fn unknown_blocks_other_methods_and_wrong_sizes_are_refused() {
        assert_eq!(
            refusal("vga.vram", 0, &[0], &[], 4096),
            r#"unknown block "vga.vram": the source has not announced it"#
        );
        assert_eq!(
            refusal("pc.ram", 2, &[0], &[], 4096),
            "expected method none, found flags 0x2: set multifd-compression to none at the source"
        );
        assert_eq!(
            refusal("pc.ram", 0, &[0, 1], &[], 4096),
            "next_packet_size 4096 does not fit 2 pages of 4 KiB: expected 8192"
        );
    }

    #[test]
    fn pages_before_the_block_list_are_refused_and_a_sync_is_not() {
        let mut head = HeadBuffer::new(PageSize::KIB_4);
        let mut listed = Listed::new(PageSize::KIB_4);
        listed.decode(head.sync(7), &OnceLock::new(), None).expect("a SYNC needs no block");
        assert!(listed.sync && listed.packet_num == 7);
        let name = BlockName::new("pc.ram").expect("a name");
        let bytes = head.pages(Flags::default(), 0, &name, &[PageIndex(0)], &[], 4096);
        let refused = listed.decode(bytes, &OnceLock::new(), None).expect_err("refused");
        assert_eq!(refused.to_string(), "packet with pages before the source announced its RAM blocks");
    }
}
