//! Resident memory beyond the guest's RAM: the peak of this process without the pages of RAM that are in memory.

use std::{fs, fs::File, io, os::unix::fs::FileExt};

use multifd::ram::{PageIndex, RamBlock, RamBlocks};

/// In bytes.
pub(super) fn peak_beyond(blocks: &RamBlocks) -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    let kib: u64 = peak.ok_or_else(|| io::Error::other("/proc/self/status has no VmHWM"))?;
    let ram = blocks.iter().map(|(_, block)| resident(block)).sum::<io::Result<u64>>()?;
    Ok((kib << 10).saturating_sub(ram))
}

/// The bytes of a block that are in memory. Huge pages count whole, as in the system's peak. The zero page, to which
/// memory is mapped that was only read, counts here but not in the peak. So this result is meaningless for untouched
/// RAM.
fn resident(block: &RamBlock) -> io::Result<u64> {
    let Some(slice) = block.slice(PageIndex(0), block.pages()) else { return Ok(0) };
    let page_size = block.page_size().bytes();
    let (mut page, end) =
        (slice.as_ptr().addr() / page_size, (slice.as_ptr().addr() + slice.len()) / page_size);
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; PIECE * ENTRY];
    let mut count = 0;
    while page < end {
        let piece = &mut entries[..(end - page).min(PIECE) * ENTRY];
        pagemap.read_exact_at(piece, (page * ENTRY) as u64)?;
        // Entries are words in host order; the top bit means that the page is in memory.
        count +=
            piece.chunks_exact(ENTRY).filter(|entry| entry.last().is_some_and(|top| top & 0x80 != 0)).count();
        page += PIECE;
    }
    Ok((count * page_size) as u64)
}

/// Bytes of an entry.
const ENTRY: usize = 8;
/// Entries read at a time. It is a small number, because the buffer counts as memory beyond RAM, too.
const PIECE: usize = 512;
