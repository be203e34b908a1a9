//! Makes one file of a machine that is in several: the file that a capture without a base would have written.
//!
//! ```text
//! N threads: pages that are present ── read from the newest file that has them, compared with their digests
//!                └── not zero ──▶ their places in the new file, with digests
//! at the end: head, bitmaps, devices of the newest file, digests
//! ```

use std::{
    fs::File,
    num::NonZero,
    sync::{Arc, atomic::AtomicU64},
};

use multifd::{
    Error, Result,
    channel::Stop,
    ram::{BlockOffset, PageIndex, RamBlock, hold_in_this_thread, with_file_size_errors},
};

use super::{
    ReadPath, StoredMachine, Tail,
    access::{direct, within_limit},
    capture::Machine,
    pieces::{each_piece, unread},
};

/// Writes a machine to one file, which QEMU loads.
#[derive(Clone, Debug)]
#[must_use]
pub struct Merge<'a> {
    machine: &'a StoredMachine,
    threads: NonZero<u8>,
    direct_io: bool,
    offset: u64,
}

impl<'a> Merge<'a> {
    /// Creates a merge of this machine with two threads, through the page cache, into a separate file.
    pub fn new(machine: &'a StoredMachine) -> Self {
        Self { machine, threads: NonZero::<u8>::MIN.saturating_add(1), direct_io: false, offset: 0 }
    }

    /// The number of threads that copy. Default 2.
    pub fn threads(mut self, threads: NonZero<u8>) -> Self {
        self.threads = threads;
        self
    }

    /// Bypasses the page cache, for the files that are read and for the one that is written. Default off.
    pub fn direct_io(mut self, on: bool) -> Self {
        self.direct_io = on;
        self
    }

    /// The offset in bytes at which the machine begins in the new file. Default 0.
    pub fn offset(mut self, bytes: u64) -> Self {
        self.offset = bytes;
        self
    }

    /// Writes the machine to `file`, which is open for writing; its contents from the offset on are lost. `about` is recorded
    /// as in a capture; by default what the newest file has. `copied` counts the bytes of pages that were read. Returns where
    /// the file ends. It is not synced. Until this returns, no reader takes the file for a machine.
    ///
    /// # Errors
    /// If a page cannot be read, or differs from its digest; if the system cannot write; if `stop` has cancelled it.
    pub fn run(&self, file: &Arc<File>, about: Option<&str>, copied: &AtomicU64, stop: &Stop) -> Result<u64> {
        let machine = Machine::stored(self.machine);
        let layout = machine.layout(self.offset)?;
        let end = layout.tail_offset();
        within_limit(end).map_err(|error| Error::other("create the layout of the file", error))?;
        with_file_size_errors(|| file.set_len(self.offset).and_then(|()| file.set_len(end)))
            .map_err(|error| Error::io(format!("extend the file to {end:#x} bytes"), error))?;
        let direct_of = |file: &File| if self.direct_io { direct(file) } else { None };
        let target = layout.ram_blocks_with_digests(file, direct_of(file).as_ref())?;
        let from = direct_of(self.machine.newest().file());
        let source =
            self.machine.ram_blocks(|_, _| from.clone().map_or(ReadPath::Cached, ReadPath::Direct))?;
        each_piece(&source, self.threads, (copied, stop), |index, block, first, bytes| {
            // A file that reaches the limit of its size is an error, and does not end the process.
            hold_in_this_thread();
            let bytes = bytes.map_err(|error| unread(block, first, error))?;
            store(target.block(index)?, first, bytes)
        })?;
        stop.check()?;
        let tail = Tail {
            switchover_start: self.machine.switchover_start(),
            devices: self.machine.devices(),
            about: about.or(self.machine.about()),
            base: None,
        };
        let written = layout.write_around(file, &target, &tail);
        written.map_err(|error| Error::other("complete the file", error))
    }
}

/// Writes the pages that are not zero.
fn store(target: &RamBlock, first: PageIndex, bytes: &[u8]) -> Result<()> {
    let size = target.page_size().bytes();
    let is_zero: Vec<_> = bytes.chunks_exact(size).map(|page| page.iter().all(|byte| *byte == 0)).collect();
    let mut start = 0;
    for run in is_zero.chunk_by(|one, other| one == other) {
        let (from, end) = (start, start + run.len());
        start = end;
        if run.first() == Some(&false)
            && let Some(pages) = bytes.get(from * size..end * size)
        {
            let at = PageIndex(first.0 + from as u64);
            target.store_direct(at, pages).map_err(|error| {
                let offset = target.offset_of(at).unwrap_or(BlockOffset(u64::MAX));
                Error::io(format!("write block {:?} at offset {offset}", target.name()), error)
            })?;
        }
    }
    Ok(())
}
