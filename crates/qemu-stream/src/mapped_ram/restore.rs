//! A machine out of a mapped-ram file, into this process's memory.
//!
//! ```text
//! MappedRamFile ── pages that are present ── N channels ──▶ guest memory
//!       └── devices ──▶ whoever builds the machine
//! ```
//!
//! The file is the one that [`MappedRamFile::open`] has checked; pages go straight from it to where they belong. What can
//! go wrong is a file that is changed meanwhile, and a disk that cannot be read: the memory then holds nothing whole.

use std::sync::Arc;

use multifd::{
    ChannelStats, Result, SendOptions, Sender,
    channel::Stop,
    ram::{PageBitmap, RamBlocks, runs},
};

use super::{MappedRamFile, ReadPath, capture::direct};

/// How a machine is loaded out of its file.
#[derive(Clone, Debug)]
#[must_use]
pub struct Restore<'a> {
    machine: &'a MappedRamFile,
    channels: u8,
    direct_io: bool,
}

impl<'a> Restore<'a> {
    /// The restore of this machine by two channels, through the page cache.
    pub fn new(machine: &'a MappedRamFile) -> Self {
        Self { machine, channels: 2, direct_io: false }
    }

    /// `multifd-channels`: how many threads read, 1 to 255. Default 2. More than there are cores seldom help.
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = channels;
        self
    }

    /// `direct-io`: reads past the page cache, straight into guest memory. Default off. It spares the cache, and costs
    /// where the file is there already. Where it cannot be, the log says so and the cache is used.
    pub fn direct_io(mut self, on: bool) -> Self {
        self.direct_io = on;
        self
    }

    /// Loads all RAM into `blocks`, mapped blocks of the file's [names and lengths](MappedRamFile::blocks), in any order,
    /// and says what each channel has moved. The devices are [the file's](MappedRamFile::devices). `stop` is spent then.
    ///
    /// Pages that the file does not have are made zero, whatever the memory held; those that the page table does not have
    /// are zero and left untouched. Blocks that were left out of the file are left alone.
    ///
    /// **Warning:** nobody may change the file or write to the memory meanwhile.
    ///
    /// # Errors
    /// If the blocks do not fit, the file cannot be read or ends too early, or `stop` has cancelled it. What the memory
    /// holds then is no machine.
    pub fn run(&self, blocks: &Arc<RamBlocks>, stop: &Stop) -> Result<Vec<ChannelStats>> {
        let loaded = self.load(blocks, stop);
        loaded.map_err(|error| stop.fail(error))
    }

    fn load(&self, blocks: &Arc<RamBlocks>, stop: &Stop) -> Result<Vec<ChannelStats>> {
        let direct = if self.direct_io { direct(self.machine.file()) } else { None };
        let source =
            self.machine.ram_blocks(|_, _| direct.clone().map_or(ReadPath::Cached, ReadPath::Direct))?;
        let source = Arc::new(source);
        let options = SendOptions::new().channels(self.channels);
        let mut sender = Sender::new(options, source.clone(), stop.clone())?;
        sender.set_up_into(blocks.clone())?;
        for (index, block) in source.iter().filter(|(_, block)| !block.is_ignored()) {
            let target = blocks.find(block.name().as_bytes()).and_then(|at| blocks.get(at));
            let may_hold = target.map(|target| target.may_hold());
            let present = block.present_words().zip(may_hold.iter().flat_map(PageBitmap::words));
            for (word, (of_file, of_memory)) in (0..).zip(present) {
                for (first, count) in runs(word, of_file) {
                    sender.queue_run(index, first, count)?;
                }
                // What memory may have and the file has not.
                for (first, count) in runs(word, of_memory & !of_file) {
                    sender.queue_zero_run(index, first, count)?;
                }
            }
        }
        sender.sync()?;
        sender.finish()
    }
}
