//! The packet head: lists the pages that follow, or marks a sync point.
//!
//! The bytes of a head are decoded to a [`Packet`] with consistent counts and with offsets on page boundaries. The
//! receiver checks whether the block exists and has those pages. The layout is drawn in
//! `docs/develop/stream-format.md`.
//!
//! Senders up to QEMU 9.1 never clear the buffer into which they write heads. So a packet that lists no pages contains
//! block name, offsets and, up to 8.1, `next_packet_size` of an earlier packet. These fields are used only in packets
//! that list pages.

use std::slice;

use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::{
    device_state::DeviceState,
    flags::Flags,
    initial::{MAGIC, VERSION, check},
    limits::packet_pages,
};
use crate::{
    error::{Error, Malformed, Unsupported},
    ram::{BlockName, BlockOffset, PageIndex, PageSize},
};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Layout {
    magic: U32,
    version: U32,
    flags: U32,
    pages_alloc: U32,
    normal_pages: U32,
    next_packet_size: U32,
    packet_num: U64,
    zero_pages: U32,
    unused: [u8; 28],
    name: [u8; 256],
}

const FIXED_LEN: usize = 320;
const _: () = assert!(size_of::<Layout>() == FIXED_LEN);

/// The length of a packet head in bytes. It depends only on the page size, never on the pages listed.
pub const fn head_len(page_size: PageSize) -> usize {
    FIXED_LEN + packet_pages(page_size) * size_of::<U64>()
}

/// A packet head with consistent fields.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// SYNC and method.
    pub flags: Flags,
    /// A number for diagnostics. It orders nothing.
    pub packet_num: u64,
    /// The length of the payload in bytes; 0 if no normal page is listed.
    pub payload_len: u32,
    /// The bytes of the block's name; empty if no page is listed.
    pub block: &'a [u8],
    normal: &'a [U64],
    zero: &'a [U64],
    page_size: PageSize,
}

impl<'a> Packet<'a> {
    /// Decodes a head.
    ///
    /// # Errors
    /// [`Malformed`] if a field is wrong or fields contradict each other, [`Unsupported`] for a device-state packet and
    /// for flags without a meaning here.
    pub fn decode(bytes: &'a [u8], page_size: PageSize) -> Result<Self, Error> {
        let expected = head_len(page_size);
        let wrong_length = Malformed::Length { expected, found: bytes.len() };
        let (layout, offsets) = Layout::ref_from_prefix(bytes).map_err(|_| wrong_length.clone())?;
        let offsets = <[U64]>::ref_from_bytes(offsets).map_err(|_| wrong_length.clone())?;
        if bytes.len() != expected {
            return Err(wrong_length.into());
        }
        check(layout.magic, layout.version)?;
        let flags = Flags(layout.flags.get());
        if flags.intersects(Flags::DEVICE_STATE) {
            let head = bytes.first_chunk().ok_or(wrong_length)?;
            let DeviceState { device, instance, .. } = DeviceState::decode(head)?;
            return Err(Unsupported::DeviceState { device, instance }.into());
        }
        if flags.unknown() != Flags::default() {
            return Err(Unsupported::Flags { flags, unknown: flags.unknown() }.into());
        }
        let (normal, zero) = layout.counts(packet_pages(page_size))?;
        let (normal, rest) = offsets.split_at(normal);
        let (zero, _) = rest.split_at(zero);
        let mut packet = Self {
            flags,
            packet_num: layout.packet_num.get(),
            payload_len: if normal.is_empty() { 0 } else { layout.next_packet_size.get() },
            block: &[],
            normal,
            zero,
            page_size,
        };
        if packet.lists_pages() {
            packet.block = layout.block()?;
            packet.check_offsets()?;
        }
        Ok(packet)
    }

    /// Whether it lists any page, normal or zero.
    pub fn lists_pages(&self) -> bool {
        !self.normal.is_empty() || !self.zero.is_empty()
    }

    /// Whether it is a sync point of its channel.
    pub fn is_sync(&self) -> bool {
        self.flags.intersects(Flags::SYNC)
    }

    /// The pages whose bytes follow, in the order in which they follow.
    pub fn normal(&self) -> Pages<'a> {
        Pages { offsets: self.normal.iter(), page_size: self.page_size }
    }

    /// The pages that are zero.
    pub fn zero(&self) -> Pages<'a> {
        Pages { offsets: self.zero.iter(), page_size: self.page_size }
    }

    fn check_offsets(&self) -> Result<(), Malformed> {
        let page_size = self.page_size;
        for offset in self.normal.iter().chain(self.zero) {
            let offset = BlockOffset(offset.get());
            if page_size.page_at(offset).is_none() {
                return Err(Malformed::Unaligned { offset, page_size });
            }
        }
        Ok(())
    }
}

impl Layout {
    fn counts(&self, most: usize) -> Result<(usize, usize), Malformed> {
        let (alloc, normal, zero) = (self.pages_alloc.get(), self.normal_pages.get(), self.zero_pages.get());
        #[expect(clippy::cast_possible_truncation, reason = "at most 128")]
        let most = most as u32;
        if alloc > most {
            return Err(Malformed::PagesAlloc { most, found: alloc });
        }
        if normal > alloc {
            return Err(Malformed::NormalPages { alloc, normal });
        }
        if zero > alloc - normal {
            return Err(Malformed::ZeroPages { alloc, normal, zero });
        }
        Ok((normal as usize, zero as usize))
    }

    /// The name up to its NUL. Senders up to 9.1 do not guarantee a NUL; the last byte counts as one.
    fn block(&self) -> Result<&[u8], Malformed> {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(BlockName::MAX_LEN);
        self.name.get(..end).filter(|name| !name.is_empty()).ok_or(Malformed::NoBlockName)
    }
}

/// The pages that a packet lists.
#[derive(Clone, Debug)]
pub struct Pages<'a> {
    offsets: slice::Iter<'a, U64>,
    page_size: PageSize,
}

impl Iterator for Pages<'_> {
    type Item = PageIndex;

    fn next(&mut self) -> Option<PageIndex> {
        // Every offset was checked to be on a page boundary when the packet was decoded.
        self.offsets.next().map(|offset| PageIndex(offset.get() >> self.page_size.bits()))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.offsets.size_hint()
    }
}

impl ExactSizeIterator for Pages<'_> {}

/// The buffer into which a channel writes heads. It is reused and cleared for every packet.
#[derive(Debug)]
pub struct HeadBuffer {
    bytes: Box<[u8]>,
    page_size: PageSize,
    /// The number of offsets of the last packet in the buffer.
    used: usize,
}

impl HeadBuffer {
    /// Creates a buffer for heads of this page size.
    pub fn new(page_size: PageSize) -> Self {
        Self { bytes: vec![0; head_len(page_size)].into(), page_size, used: 0 }
    }

    /// Writes the head of a packet with pages of one block. Nothing of an earlier packet remains.
    ///
    /// # Panics
    /// If more pages are listed than fit into a packet, or a page has no offset. A batch has no more pages than that,
    /// and a block has no such page.
    pub fn pages(
        &mut self,
        method: Flags,
        packet_num: u64,
        block: &BlockName,
        normal: &[PageIndex],
        zero: &[PageIndex],
        payload_len: u32,
    ) -> &[u8] {
        let (most, page_size) = (packet_pages(self.page_size), self.page_size);
        assert!(normal.len() + zero.len() <= most, "a batch holds no more pages than a packet");
        let (layout, offsets) = self.cleared();
        layout.flags = method.masked(Flags::METHOD).0.into();
        layout.pages_alloc = count(most);
        layout.normal_pages = count(normal.len());
        layout.next_packet_size = payload_len.into();
        layout.packet_num = packet_num.into();
        layout.zero_pages = count(zero.len());
        let name = block.as_bytes();
        for (to, byte) in layout.name.iter_mut().zip(name) {
            *to = *byte;
        }
        for (offset, page) in offsets.iter_mut().zip(normal.iter().chain(zero)) {
            *offset = page_size.offset_of(*page).expect("a page of a block has an offset").0.into();
        }
        self.used = normal.len() + zero.len();
        &self.bytes
    }

    /// Writes a SYNC packet. It lists no pages: a 9.2.0 destination would lose them.
    pub fn sync(&mut self, packet_num: u64) -> &[u8] {
        let (layout, _) = self.cleared();
        layout.flags = Flags::SYNC.0.into();
        layout.packet_num = packet_num.into();
        self.used = 0;
        &self.bytes
    }

    fn cleared(&mut self) -> (&mut Layout, &mut [U64]) {
        let (layout, offsets) = Layout::mut_from_prefix(&mut self.bytes).expect("the buffer holds a head");
        let offsets = <[U64]>::mut_from_bytes(offsets).expect("the rest of the buffer is offsets");
        *layout = Layout::new_zeroed();
        layout.magic = MAGIC.into();
        layout.version = VERSION.into();
        offsets.iter_mut().take(self.used).for_each(|offset| *offset = U64::ZERO);
        (layout, offsets)
    }
}

fn count(pages: usize) -> U32 {
    u32::try_from(pages).expect("a packet holds at most 128 pages").into()
}

#[cfg(test)]
mod tests;
