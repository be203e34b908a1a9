//! The guest's program, the map of its memory, and the expected value of every byte.
//!
//! ```text
//! 0x1000   the program (guest.s)                    port 0x10 out   a batch of 256 pages is done: its number
//! 0x2000   its state                                port 0x11 out   wrong: the address
//! 0x3000   the mailbox: the device writes to it     port 0x12 in    the clock, in milliseconds
//! 1 MiB    its pages, up to the end of RAM
//! ```
//!
//! In every page, three words contain how often it was written; the rest is noise that does not change.
//!
//! UNSAFETY: reads the bytes between two labels of the assembler.
#![expect(unsafe_code, reason = "the program's bytes")]

use std::slice;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, bitmap::AtomicBitmap};

/// Guest memory, whose regions record what the VMM itself writes to them.
pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

std::arch::global_asm!(include_str!("guest.s"), options(att_syntax, raw));

// SAFETY: both are labels that guest.s defines.
unsafe extern "C" {
    static microvm_guest_start: u8;
    static microvm_guest_end: u8;
}

fn program() -> &'static [u8] {
    let (start, end) = (&raw const microvm_guest_start, &raw const microvm_guest_end);
    // SAFETY: guest.s puts `end` after `start` in one section of constant data.
    unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The number of pages that a guest of `size` bytes rewrites, in whole batches.
pub(crate) fn pages(size: u64) -> u64 {
    (size.saturating_sub(SET) / PAGE as u64) / BATCH * BATCH
}

/// Loads the program and fills the pages.
pub(crate) fn load(memory: &Memory, size: u64) -> Result<(), GuestMemoryError> {
    memory.write_slice(program(), GuestAddress(CODE))?;
    memory.write_obj(low(pages(size)), GuestAddress(STATE + 16))?;
    (0..pages(size)).try_for_each(|page| memory.write_slice(&expected(page, 0), at(page)))
}

/// Compares every page with its expected contents after `batches` batches; returns how many bytes are wrong. The guest
/// must be stopped between two batches.
pub(crate) fn wrong_bytes(memory: &Memory, size: u64, batches: u64) -> Result<u64, GuestMemoryError> {
    let (pages, mut wrong, mut found) = (pages(size), 0, [0; PAGE]);
    for page in 0..pages {
        memory.read_slice(&mut found, at(page))?;
        let written = batches * BATCH;
        let expected = expected(page, written / pages + u64::from(page < written % pages));
        if found != expected {
            wrong += found.iter().zip(&expected).filter(|(found, expected)| found != expected).count() as u64;
        }
    }
    Ok(wrong)
}

/// The expected contents of a page that was written `version` times.
fn expected(page: u64, version: u64) -> [u8; PAGE] {
    let (mut bytes, mut noise) = ([0; PAGE], page | 1 << 63);
    for word in bytes.chunks_exact_mut(8) {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        word.copy_from_slice(&noise.to_be_bytes());
    }
    let value = low(version).wrapping_mul(STEP).wrapping_add(low(page));
    for at in [0, 2048, 4092] {
        // Lowest byte first, as the guest's processor writes it.
        bytes[at..at + 4].copy_from_slice(&value.swap_bytes().to_be_bytes());
    }
    bytes
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(SET + page * PAGE as u64)
}

/// The guest counts in 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "as the guest does")]
pub(crate) fn low(number: u64) -> u32 {
    number as u32
}

pub(crate) const CODE: u64 = 0x1000;
pub(crate) const MAILBOX: u64 = 0x3000;
/// Pages that the guest writes between two reports.
pub(crate) const BATCH: u64 = 256;
pub(crate) const PAGE: usize = 4096;
pub(crate) const REPORT: u16 = 0x10;
pub(crate) const WRONG: u16 = 0x11;
pub(crate) const CLOCK: u16 = 0x12;
const STATE: u64 = 0x2000;
const SET: u64 = 1 << 20;
const STEP: u32 = 0x9e37_79b1;
