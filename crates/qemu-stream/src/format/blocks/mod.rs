//! The block list of the RAM section's START.
//!
//! ```text
//! u64 total | MEM_SIZE (0x4)
//! per block: counted name | u64 used length | [u64 host page size, if POSTCOPY_ADVISE was sent]
//!            | [u64 address, if x-ignore-shared] | [mapped-ram header]
//! ```
//!
//! The list has no count: it ends when the sum of the lengths equals the total. So a list cannot end with an empty
//! block. The total must be whole pages, or its low bits would be read as flags.
//!
//! After POSTCOPY_ADVISE a block has a host page size only if its host pages are not those of the source's system. Nothing
//! announces it, but it cannot be confused with what follows otherwise: its first byte is 0 and that of a name is not, and
//! it is at least a page, while the records after the list are flags only.

use std::{collections::HashMap, io::Read};

use multifd::{
    channel::hand_over::SharedMemory,
    ram::{BlockIndex, BlockName, BlockOffset, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
};

use super::{Put, Reader, limits};
use crate::error::{Error, Malformed, Usage, Violation};

/// The flag of the first record: the lengths of all blocks follow.
pub(super) const MEM_SIZE: u64 = 0x4;

/// One block of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// Its name (`idstr`).
    pub name: BlockName,
    /// Bytes in use, whole pages.
    pub used_length: u64,
    /// The block's guest-physical address; sent only with x-ignore-shared.
    pub address: Option<u64>,
    /// The size of the host's pages behind the block, if it is not the page size of the source's system: of a block in huge
    /// pages. Sent only after [`Command::PostcopyAdvise`](super::Command::PostcopyAdvise), never in a mapped-ram file.
    pub host_page_size: Option<u64>,
}

impl BlockEntry {
    /// A block without an address, and without a host page size of its own.
    pub fn new(name: BlockName, used_length: u64) -> Self {
        Self { name, used_length, address: None, host_page_size: None }
    }

    /// Appends the entry without a host page size; a mapped-ram header is not part of it.
    pub(crate) fn encode(&self, ignore_shared: bool, out: &mut Vec<u8>) {
        out.put_name(&self.name);
        out.put_u64(self.used_length);
        self.encode_address(ignore_shared, out);
    }

    fn encode_address(&self, ignore_shared: bool, out: &mut Vec<u8>) {
        if ignore_shared {
            out.put_u64(self.address.unwrap_or_default());
        }
    }
}

/// All RAM blocks of a machine, in the order of the stream. Names are unique, lengths are whole pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockList {
    entries: Vec<BlockEntry>,
    by_name: HashMap<BlockName, BlockIndex>,
    page_size: PageSize,
    total: u64,
}

impl BlockList {
    /// Creates a list of these blocks.
    ///
    /// # Errors
    /// If two have the same name, a length is not a whole number of pages, the last one is empty, there are more or
    /// longer blocks than a list may have, or a host page size is not a power of two or is less than a page.
    pub fn new(entries: Vec<BlockEntry>, page_size: PageSize) -> Result<Self, Usage> {
        let refused = |why: String| Err(Usage::Blocks(why));
        let fits = |size: &u64| {
            size.is_power_of_two() && (page_size.bytes() as u64..=limits::HOST_PAGE).contains(size)
        };
        if let Some(bad) = entries.iter().find(|entry| !entry.host_page_size.as_ref().is_none_or(fits)) {
            let size = bad.host_page_size.unwrap_or_default();
            return refused(format!("\"{}\" has host pages of {size:#x} bytes", bad.name));
        }
        if entries.len() > limits::BLOCKS {
            return refused(format!("expected at most {}, found {}", limits::BLOCKS, entries.len()));
        }
        if let Some(last) = entries.last().filter(|last| last.used_length == 0) {
            return refused(format!(
                "\"{}\" is empty and the last one, where a destination does not read it: list it earlier, or omit it",
                last.name
            ));
        }
        let mut list = Self::none(page_size);
        for entry in entries {
            if entry.used_length % page_size.bytes() as u64 != 0 {
                let length = entry.used_length;
                return refused(format!("\"{}\" has {length:#x} bytes, not whole pages", entry.name));
            }
            if entry.used_length > limits::RAM_TOTAL - list.total {
                return refused(format!("expected at most {:#x} bytes in all", limits::RAM_TOTAL));
            }
            if list.position(&entry.name).is_some() {
                return refused(format!("\"{}\" exists twice", entry.name));
            }
            list.push(entry);
        }
        Ok(list)
    }

    /// The blocks.
    pub fn entries(&self) -> &[BlockEntry] {
        &self.entries
    }

    /// The blocks with their numbers.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockIndex, &BlockEntry)> {
        self.entries.iter().enumerate().map(|(i, entry)| (BlockIndex(i), entry))
    }

    /// The block of this number.
    pub fn entry(&self, block: BlockIndex) -> Option<&BlockEntry> {
        self.entries.get(block.0)
    }

    /// The index of the block with this name.
    pub fn position(&self, name: &BlockName) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    /// The page size; all lengths are multiples of it.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Bytes in all blocks together.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Creates these blocks in new [anonymous memory](Mapping::anonymous), which uses no memory until it is touched.
    /// For a machine whose blocks are all plain RAM; other machines create each block as its device needs it.
    ///
    /// # Errors
    /// If the system has no addresses for so much memory.
    pub fn in_new_memory(&self) -> multifd::Result<RamBlocks> {
        self.in_memory_of(&[])
    }

    /// Creates these blocks in `memory` that a source has [handed over](multifd::channel::hand_over), as [ignored
    /// blocks](RamBlock::ignored), and all others in new memory. The guest must not run, and nothing may write to the memory, before
    /// the migration is confirmed: until then the source may continue with it.
    ///
    /// # Errors
    /// If a block of `memory` is not in the list or has another length, or the system refuses a mapping.
    pub fn in_memory_of(&self, memory: &[SharedMemory]) -> multifd::Result<RamBlocks> {
        for SharedMemory { block, length, .. } in memory {
            let entry = self.entries.iter().find(|entry| entry.name == *block);
            match entry.map(|entry| entry.used_length) {
                None => return Err(multifd::error::Usage::BlockSurplus(block.clone()).into()),
                Some(announced) if announced != *length => {
                    let (name, found) = (block.clone(), *length);
                    return Err(multifd::error::Usage::BlockLength { name, announced, found }.into());
                }
                Some(_) => {}
            }
        }
        let block = |entry: &BlockEntry| -> multifd::Result<RamBlock> {
            let (name, length) = (&entry.name, entry.used_length);
            let shared = memory.iter().find(|shared| shared.block == *name);
            let mapping = shared.map_or_else(|| Mapping::anonymous(length), SharedMemory::map);
            let mapping = mapping.map_err(|error| {
                multifd::Error::io(format!("map {length:#x} bytes for block {name:?}"), error)
            })?;
            let block = RamBlock::new(name.clone(), length, self.page_size, Memory::Mapped(mapping))?;
            Ok(if shared.is_some() { block.ignored() } else { block })
        };
        let blocks = self.entries.iter().map(block).collect::<multifd::Result<_>>()?;
        Ok(RamBlocks::new(blocks)?)
    }

    /// The offset of `page` of `block`; `None` if the block has no such page.
    pub fn offset_of(&self, block: BlockIndex, page: PageIndex) -> Option<BlockOffset> {
        let pages = self.page_size.whole_pages_in(self.entry(block)?.used_length);
        if page.0 < pages { self.page_size.offset_of(page) } else { None }
    }

    /// Appends the list in the form of START over a socket. [Host page sizes](BlockEntry::host_page_size) are part of it: a
    /// destination reads them only after POSTCOPY_ADVISE.
    pub fn encode(&self, ignore_shared: bool, out: &mut Vec<u8>) {
        self.encode_total(out);
        for entry in &self.entries {
            out.put_name(&entry.name);
            out.put_u64(entry.used_length);
            if let Some(size) = entry.host_page_size {
                out.put_u64(size);
            }
            entry.encode_address(ignore_shared, out);
        }
    }

    /// Decodes the list in the form of START over a socket. `advised`: POSTCOPY_ADVISE was sent before, so blocks may have
    /// [host page sizes](BlockEntry::host_page_size).
    ///
    /// # Errors
    /// If a field is malformed, a bound is exceeded, a name occurs twice, or the stream ends early.
    pub fn decode<R: Read>(
        r: &mut Reader<R>,
        page_size: PageSize,
        shared: bool,
        advised: bool,
    ) -> Result<Self, Error> {
        let mut reader = ListReader::begin(r, page_size, shared)?;
        reader.advised = advised;
        while reader.next(r)?.is_some() {}
        Ok(reader.list)
    }

    /// A list without blocks.
    pub(crate) fn none(page_size: PageSize) -> Self {
        Self { entries: Vec::new(), by_name: HashMap::new(), page_size, total: 0 }
    }

    pub(crate) fn encode_total(&self, out: &mut Vec<u8>) {
        out.put_u64(self.total | MEM_SIZE);
    }

    fn push(&mut self, entry: BlockEntry) {
        self.total += entry.used_length;
        self.by_name.insert(entry.name.clone(), BlockIndex(self.entries.len()));
        self.entries.push(entry);
    }
}

/// Reads a list entry by entry, for callers that read something between two entries.
pub(crate) struct ListReader {
    list: BlockList,
    left: u64,
    ignore_shared: bool,
    /// Blocks may have host page sizes.
    advised: bool,
}

impl ListReader {
    pub(crate) fn begin<R: Read>(
        r: &mut Reader<R>,
        page_size: PageSize,
        ignore_shared: bool,
    ) -> Result<Self, Error> {
        let head = r.u64("total of the block list")?;
        let flags = head & (page_size.bytes() as u64 - 1);
        if flags != MEM_SIZE {
            return Err(
                Malformed::value("flags of the first ram record", "MEM_SIZE (0x4)", flags).at(r.place())
            );
        }
        let left = head & !flags;
        if left > limits::RAM_TOTAL {
            return Err(Malformed::too_long("total of the block list", limits::RAM_TOTAL, left).at(r.place()));
        }
        let list = BlockList::none(page_size);
        Ok(Self { list, left, ignore_shared, advised: false })
    }

    /// The next entry; `None` at the end of the list.
    pub(crate) fn next<R: Read>(&mut self, r: &mut Reader<R>) -> Result<Option<&BlockEntry>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        let at = r.here();
        if self.list.entries.len() == limits::BLOCKS {
            let max = limits::BLOCKS as u64;
            return Err(Malformed::too_long("number of blocks", max, max + 1).at(at));
        }
        let name = r.block_name("name of a block")?;
        let used_length = r.u64("used length of a block")?;
        if used_length % self.list.page_size.bytes() as u64 != 0 {
            let page_size = self.list.page_size.bytes() as u64;
            return Err(Violation::PartialPage { block: name, page_size, found: used_length }.at(at));
        }
        if used_length > self.left {
            return Err(Violation::BeyondTotal { block: name, left: self.left, found: used_length }.at(at));
        }
        if self.list.position(&name).is_some() {
            return Err(Violation::BlockTwice(name).at(at));
        }
        self.left -= used_length;
        let host_page_size = if self.advised { self.host_page_size(r)? } else { None };
        let address = if self.ignore_shared { Some(r.u64("address of a block")?) } else { None };
        self.list.push(BlockEntry { name, used_length, address, host_page_size });
        Ok(self.list.entries.last())
    }

    /// Takes the host page size of a block, if it is there. What follows otherwise is the length of the next name, which is
    /// not 0, or behind the last block a record without a page, which is less than a page. An address is never there: the
    /// capabilities exclude each other.
    fn host_page_size<R: Read>(&self, r: &mut Reader<R>) -> Result<Option<u64>, Error> {
        if r.peek()? != Some(0) {
            return Ok(None);
        }
        let page_size = self.list.page_size.bytes() as u64;
        if self.left == 0 {
            let next = r.peek_bytes(size_of::<u64>())?.and_then(|bytes| bytes.try_into().ok());
            if next.map(u64::from_be_bytes).is_none_or(|next| next < page_size) {
                return Ok(None);
            }
        }
        let size = r.u64("host page size of a block")?;
        if !size.is_power_of_two() || size < page_size || size > limits::HOST_PAGE {
            let expected = "a power of two, at least a page and at most 0x40000000000";
            return Err(Malformed::value("host page size of a block", expected, size).at(r.place()));
        }
        Ok(Some(size))
    }

    pub(crate) fn finish(self) -> BlockList {
        self.list
    }
}

#[cfg(test)]
mod tests;
