//! Guests, blocks and hops.

use std::{sync::Arc, thread};

use multifd::{
    Error,
    channel::{Address, Listener, Stop},
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, MigrateOptions, MigrationInfo, RunState},
    ram::{BlockIndex, BlockName, DirtyLog, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Confirmed, Pending},
    format::{BlockList, Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};

pub(crate) fn block(name: &str, pages: u64) -> RamBlock {
    let memory = Memory::Mapped(Mapping::anonymous(pages * 4096).expect("memory"));
    let name = BlockName::new(name).expect("a name");
    RamBlock::new(name, pages * 4096, PageSize::KIB_4, memory).expect("a block")
}

pub(crate) fn blocks(list: &[(&str, u64)]) -> Arc<RamBlocks> {
    Arc::new(
        RamBlocks::new(list.iter().map(|(name, pages)| block(name, *pages)).collect()).expect("distinct"),
    )
}

pub(crate) fn listening() -> (Listener, Address) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let address = listener.local_address().clone();
    (listener, address)
}

/// A guest with one page of state, which follows its settings.
#[derive(Default)]
pub(crate) struct Told {
    pub(super) paused: bool,
    pub(crate) stops: u32,
    pub(crate) resumes: u32,
    pub(super) panics_in: &'static str,
    pub(super) fails_in: &'static str,
}

impl Told {
    fn at(&self, call: &'static str) -> std::io::Result<()> {
        assert_ne!(self.panics_in, call, "as told");
        if self.fails_in == call { Err(std::io::Error::other("as told")) } else { Ok(()) }
    }
}

const TOLD: DeviceName = DeviceName::from_static("told");

impl Guest for Told {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(TOLD, 4)]
    }
    fn run_state(&mut self) -> RunState {
        self.at("Guest::run_state").expect("it only panics");
        if self.paused { RunState::Paused } else { RunState::Running }
    }
    fn stop(&mut self) -> std::io::Result<()> {
        self.at("Guest::stop")?;
        self.stops += 1;
        Ok(())
    }
    fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
        self.at("Guest::save")?;
        Ok(vec![DeviceSection { name: TOLD, instance_id: 0, version: 1, data: vec![1; 4] }])
    }
    fn resume(&mut self) {
        self.resumes += 1;
    }
}

pub(crate) fn departure(
    blocks: &Arc<RamBlocks>,
    channels: u8,
    migrate: MigrateOptions,
    stop: &Stop,
) -> Source {
    let machine = MachineType::new("told-1").expect("a name");
    let options = SourceOptions::new(Configuration::new(machine)).channels(channels).migrate(migrate);
    Source::new(blocks.clone(), options, stop).expect("options")
}

pub(crate) type Made = Result<RamBlocks, Error>;

/// Migrates `source` to a destination that makes its blocks with `make` and then calls `then`.
pub(super) fn hop<T: Send + 'static>(
    source: &Arc<RamBlocks>,
    channels: u8,
    migrate: MigrateOptions,
    log: &mut dyn DirtyLog,
    guest: &mut Told,
    make: impl FnMut(Option<&Configuration>, &BlockList) -> Made + Send + 'static,
    then: impl FnOnce(Pending) -> Result<T, Error> + Send + 'static,
) -> (Result<MigrationInfo, Error>, Result<T, Error>) {
    let (listener, address) = listening();
    let arriving = thread::spawn(move || {
        let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
        let arrival = Arrival::listen(listener, ArrivalOptions::new(expected), &Stop::new())?.accept()?;
        arrival.load(make).and_then(then)
    });
    let left = departure(source, channels, migrate, &Stop::new()).migrate(address, log, guest);
    (left, arriving.join().expect("no panic"))
}

pub(super) fn taken(pending: Pending) -> Result<(Arc<RamBlocks>, RunState), Error> {
    let confirmed: Confirmed = pending.confirm()?;
    let arrived = (confirmed.blocks().clone(), confirmed.run_state());
    confirmed.finish();
    Ok(arrived)
}

pub(super) fn fill(blocks: &RamBlocks) {
    for (index, block) in blocks.iter() {
        for page in (0..block.pages()).filter(|page| page % 3 != 2) {
            let word = (index.0 as u64 + 1) << 32 | page;
            block.store(PageIndex(page), &word.to_be_bytes().repeat(512)).expect("stored");
        }
    }
}

/// The first block of `here` that differs from the block of the same name in `there`.
pub(super) fn difference(here: &RamBlocks, there: &RamBlocks) -> Option<String> {
    let bytes = |block: &RamBlock| {
        let slice = block.slice(PageIndex(0), block.pages()).expect("mapped");
        let mut bytes = vec![0; slice.len()];
        slice.copy_to(&mut bytes);
        bytes
    };
    let differs = |(_, block): &(BlockIndex, &RamBlock)| {
        let other = there.find(block.name().as_bytes()).and_then(|at| there.get(at));
        other.is_none_or(|other| bytes(other) != bytes(block))
    };
    here.iter().find(differs).map(|(_, block)| block.name().to_string())
}

pub(crate) const RAM: [(&str, u64); 3] = [("low", 64), ("high", 64), ("rom", 8)];

pub(crate) fn as_announced(_: Option<&Configuration>, list: &BlockList) -> Made {
    let entries = list.entries().iter();
    let made = entries.map(|entry| block(&entry.name.to_string(), entry.used_length / 4096));
    Ok(RamBlocks::new(made.collect())?)
}
