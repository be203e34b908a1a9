//! Restores a machine from a mapped-ram file into this process's memory.
//!
//! ```text
//! MappedRamFile ── pages that are present ── N channels ──▶ guest memory
//!       └── devices ──▶ the code that builds the machine
//! ```
//!
//! [`StoredMachine::open`] has checked the files. Pages go directly from it to their places in memory. The restore fails
//! if the file is changed in the meantime or the disk cannot be read; the memory then contains no complete machine.

use std::sync::Arc;

use multifd::{
    ChannelStats, Result, SendOptions, Sender,
    channel::Stop,
    ram::{Access, PageBitmap, RamBlocks, runs},
};

use super::{ReadPath, StoredMachine, access::direct};

/// Loads a machine from its file.
#[derive(Clone, Debug)]
#[must_use]
pub struct Restore<'a> {
    pub(super) machine: &'a StoredMachine,
    channels: u8,
    direct_io: bool,
}

impl<'a> Restore<'a> {
    /// Creates a restore of this machine with two channels, through the page cache.
    pub fn new(machine: &'a StoredMachine) -> Self {
        Self { machine, channels: 2, direct_io: false }
    }

    /// `multifd-channels`: the number of threads that read, 1 to 255. Default 2. More threads than cores seldom help.
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = channels;
        self
    }

    /// `direct-io`: bypasses the page cache and reads directly into guest memory. Default off. It saves cache memory,
    /// but is slower if the file is in the cache already. If it is not supported, the log says so and the cache is
    /// used.
    pub fn direct_io(mut self, on: bool) -> Self {
        self.direct_io = on;
        self
    }

    /// Loads all RAM into `blocks`, mapped blocks with the file's [names and lengths](StoredMachine::blocks), in any
    /// order. Returns the counters of each channel. The devices are [the file's](StoredMachine::devices). `stop` cannot
    /// be used again.
    ///
    /// Pages that the file does not have are made zero, also in memory with other contents. Pages that are known to be
    /// [untouched](multifd::ram::RamBlock::touched) are zero and stay untouched. Blocks that were left out of the file are not changed.
    ///
    /// **Warning:** nothing may change the file or write to the memory in the meantime.
    ///
    /// # Errors
    /// If the blocks do not fit, the file cannot be read or ends too early, this process may not access memory that would
    /// be written, or `stop` has cancelled it. The memory then contains no complete machine.
    pub fn run(&self, blocks: &Arc<RamBlocks>, stop: &Stop) -> Result<Vec<ChannelStats>> {
        let loaded = self.load(blocks, stop);
        loaded.map_err(|error| stop.fail(error))
    }

    /// The machine's blocks in its files, and how they are read.
    pub(super) fn blocks(&self) -> Result<RamBlocks> {
        let direct = if self.direct_io { direct(self.machine.newest().file()) } else { None };
        self.machine.ram_blocks(|_, _| direct.clone().map_or(ReadPath::Cached, ReadPath::Direct))
    }

    fn load(&self, blocks: &Arc<RamBlocks>, stop: &Stop) -> Result<Vec<ChannelStats>> {
        let source = Arc::new(self.blocks()?);
        // Before there is a sender, whose drop would cancel everything and hide the reason.
        let touched = blocks.touched();
        blocks.refuse_inaccessible(&blocks.inaccessible(Access::ReadWrite), |index, page| {
            let target = blocks.get(index).filter(|target| !target.is_ignored());
            let of_file = target.and_then(|target| source.get(source.find(target.name().as_bytes())?));
            let may_hold = touched.get(index.0).and_then(Option::as_ref);
            of_file.is_some_and(|of_file| {
                !of_file.is_ignored()
                    && (of_file.is_present(page) || may_hold.is_none_or(|pages| pages.contains(page)))
            })
        })?;
        let options = SendOptions::new().channels(self.channels);
        let mut sender = Sender::new(options, source.clone(), stop.clone())?;
        sender.set_up_into(blocks.clone())?;
        for (index, block) in source.iter().filter(|(_, block)| !block.is_ignored()) {
            let target = blocks.find(block.name().as_bytes());
            let may_hold = target.and_then(|at| touched.get(at.0)).map(|touched| match touched {
                Some(touched) => touched.words().collect(),
                None => PageBitmap::full(block.pages()).words().collect::<Vec<_>>(),
            });
            let present = block.present_words().zip(may_hold.into_iter().flatten());
            for (word, (of_file, of_memory)) in (0..).zip(present) {
                for (first, count) in runs(word, of_file) {
                    sender.queue_run(index, first, count)?;
                }
                // Pages that may be nonzero in memory and are not in the file.
                for (first, count) in runs(word, of_memory & !of_file) {
                    sender.queue_zero_run(index, first, count)?;
                }
            }
        }
        sender.sync()?;
        sender.finish()
    }
}
