//! The guest's memory: new, shared with another process, or taken from one.

use std::fs::File;

use multifd::ram::{PageSize, RamBlocks, blocks_of};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

use crate::{
    Failure,
    guest::{self, Memory},
};

/// Guest memory of `size` bytes, all zero.
pub(crate) fn new(size: u64) -> Result<Memory, Failure> {
    let fits = (LEAST..=MOST).contains(&size) && size.is_multiple_of(guest::PAGE as u64);
    let size = usize::try_from(size).ok().filter(|_| fits);
    let size =
        size.ok_or_else(|| format!("expected {LEAST:#x} to {MOST:#x} bytes of memory in whole pages"))?;
    Ok(Memory::from_ranges(&[(GuestAddress(0), size)])?)
}

/// Guest memory of `size` bytes that another process can map as well, all zero.
pub(crate) fn shared(size: u64) -> Result<Memory, Failure> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(size)?;
    // Nobody can take away memory that is mapped.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    in_file(file, size)
}

/// Guest memory in a file.
pub(crate) fn in_file(file: File, size: u64) -> Result<Memory, Failure> {
    if !(LEAST..=MOST).contains(&size) || !size.is_multiple_of(guest::PAGE as u64) {
        return Err(format!("expected {LEAST:#x} to {MOST:#x} bytes of memory in whole pages").into());
    }
    let range = (GuestAddress(0), usize::try_from(size)?, Some(FileOffset::new(file, 0)));
    Ok(Memory::from_ranges_with_files([range])?)
}

/// The memory as RAM blocks.
pub(crate) fn blocks(memory: &Memory) -> Result<RamBlocks, multifd::ram::Error> {
    blocks_of(memory, PageSize::KIB_4)
}

const LEAST: u64 = 4 << 20;
/// The range of 32-bit addresses, below the kernel's own pages.
const MOST: u64 = 3 << 30;
