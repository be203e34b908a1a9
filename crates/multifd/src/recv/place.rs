//! Writes received pages to guest memory or to a file.
//!
//! Into mapped memory, pages are received in place, adjacent ones as one vector. Into a file, with compression, and when the guest
//! uses the memory already, they are copied through one buffer of the channel. A zero page is cleared only if it may contain anything other than zero.

use arrayvec::ArrayVec;

use super::{arrived::Arrived, decode::Listed, late::PlaceLate, packet_reader::PacketReader};
use crate::{
    batch::neighbours,
    compress::{Decode, DecoderMemory},
    error::{Error, Malformed, Result},
    ram::{AlignedBuffer, BlockOffset, MAX_PARTS, Memory, PageIndex, PageRun, PartMut, RamBlock},
    wire::limits::{PACKET_BYTES, PAYLOAD_BYTES},
};

pub(super) struct Placer {
    /// Of all channels.
    memory: DecoderMemory,
    /// The decoder, created at the first packet with pages and kept, because the payloads of a channel are one stream.
    decoder: Option<Box<dyn Decode>>,
    /// A packet's compressed payload.
    payload: Box<[u8]>,
    /// A packet's pages, if these cannot be received in place; created when first needed.
    pages: AlignedBuffer,
}

impl Placer {
    pub(super) fn new(memory: DecoderMemory) -> Self {
        Self { memory, decoder: None, payload: Box::default(), pages: AlignedBuffer::default() }
    }

    /// Receives the packet's payload and writes its pages.
    pub(super) fn place(
        &mut self,
        packets: &mut PacketReader,
        listed: &Listed,
        arrived: &Arrived,
    ) -> Result<()> {
        let block = arrived.blocks().block(listed.block)?;
        if !listed.normal.is_empty() {
            for (first, count) in neighbours(listed.normal.iter().copied()) {
                arrived.check_access(block, listed.block, first, count)?;
                // If the connection breaks within the bytes, a zero page may follow over another one.
                arrived.may_hold(listed.block, first, count);
            }
            self.normal(packets, listed, block, arrived.late())?;
            for (first, count) in neighbours(listed.normal.iter().copied()) {
                arrived.placed(listed.block, first, count);
            }
        }
        for (first, count) in neighbours(listed.zero.iter().copied()) {
            arrived.clear_run(block, listed.block, first, count)?;
        }
        Ok(())
    }

    fn normal(
        &mut self,
        packets: &mut PacketReader,
        listed: &Listed,
        block: &RamBlock,
        late: Option<&dyn PlaceLate>,
    ) -> Result<()> {
        let mut parts: ArrayVec<PartMut<'_>, MAX_PARTS> = ArrayVec::new();
        if self.decoder.is_none()
            && let Some(decoder) = listed.method.decoder(&self.memory)?
        {
            self.decoder = Some(decoder);
            self.payload = vec![0; PAYLOAD_BYTES as usize].into();
        }
        if let (None, None, Memory::Mapped(_)) = (&self.decoder, late, block.memory()) {
            for (first, count) in neighbours(listed.normal.iter().copied()) {
                parts.push(block.slice(first, count).expect("listed pages are in their block").into());
            }
            return packets.payload(parts, listed.payload_len);
        }
        if self.pages.is_empty() {
            // One byte longer than the pages of a packet.
            self.pages = AlignedBuffer::new(PACKET_BYTES + 1);
        }
        let length = listed.normal.len() * block.page_size().bytes();
        match &mut self.decoder {
            None => {
                let pages = self.pages.get_mut(..length).expect(BOUNDED);
                parts.push(PartMut::from(pages));
                packets.payload(parts, listed.payload_len)?;
            }
            Some(decoder) => {
                let payload = self.payload.get_mut(..listed.payload_len).expect(BOUNDED);
                parts.push(PartMut::from(&mut *payload));
                packets.payload(parts, listed.payload_len)?;
                let pages = self.pages.get_mut(..=length).expect(BOUNDED);
                let found = decoder.decode(payload, pages)?;
                if found != length {
                    return Err(Malformed::Inflated { expected: length, found }.into());
                }
            }
        }
        let mut rest = self.pages.get(..length).expect(BOUNDED);
        for (first, count) in neighbours(listed.normal.iter().copied()) {
            let length =
                usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(block.page_size().bytes());
            let (run, after) = rest.split_at(length);
            match late {
                Some(late) => late.place(PageRun { block: listed.block, first, count }, run)?,
                None => block.store_direct(first, run).map_err(|error| not_stored(block, first, error))?,
            }
            rest = after;
        }
        Ok(())
    }
}

/// `decode` has refused every packet that lists more.
const BOUNDED: &str = "a packet stays within its bounds";

fn not_stored(block: &RamBlock, first: PageIndex, error: std::io::Error) -> Error {
    let offset = block.offset_of(first).unwrap_or(BlockOffset(u64::MAX));
    Error::io(format!("write block {:?} at offset {offset}", block.name()), error)
}
