//! A hand-over on one host: how long the guest is stopped, at each size of its memory.

use std::{
    fs::File,
    io,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use multifd::{
    ReceiveOptions,
    channel::{
        Address, Stop,
        hand_over::{HandOver, HandOverListener, SharedMemory},
    },
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{Access, BlockName, Mapping, Memory, NeverDirty, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    format::{Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::{
    args::SnapshotsArgs,
    memory::{block, enough, fill},
    table::{Row, Table, median, time},
};
use crate::{Result, free};

pub(super) fn measure(args: &SnapshotsArgs, table: &mut Table) -> Result<()> {
    for bytes in args.ram.iter().map(|ram| ram << 20) {
        let setting = format!("{} MiB, a memory file", bytes >> 20);
        if let Err(error) = enough(bytes) {
            table.add(Row::new("downtime of a hand-over", &setting).without(&error.to_string()));
            continue;
        }
        free::warm(bytes)?;
        let mut machine = Machine::new(bytes)?;
        let times = (0..args.rounds).map(|_| machine.hand_over()).collect::<Result<Vec<_>>>()?;
        let most = times.iter().max().copied().unwrap_or_default();
        let row = Row::new("downtime of a hand-over", &setting).at_most(median(times), DOWNTIME);
        table.add(row.note(format!("longest {}", time(most))));
    }
    Ok(())
}

/// A machine whose memory is a file.
struct Machine {
    file: File,
    bytes: u64,
    blocks: Arc<RamBlocks>,
    stopped: Instant,
}

impl Machine {
    fn new(bytes: u64) -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("ram", flags)?);
        file.set_len(bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        let mapping = Mapping::of_file(&file, 0, bytes, Access::ReadWrite)?;
        let ram = RamBlock::new(name()?, bytes, PageSize::KIB_4, Memory::Mapped(mapping))?.ignored();
        let blocks = Arc::new(RamBlocks::new(vec![ram])?);
        fill(block(&blocks))?;
        Ok(Self { file, bytes, blocks, stopped: Instant::now() })
    }

    /// Hands it over to another thread. Returns the time from the stop to the moment at which the guest may run there.
    fn hand_over(&mut self) -> Result<Duration> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("socket");
        let (listener, handed) = HandOverListener::bind(&Address::Unix(path.clone()))?;
        let confirmed = thread::scope(|threads| {
            let receives = threads.spawn(|| -> multifd::Result<Instant> {
                let options = ArrivalOptions::new(Expected::AnyMachine);
                let options =
                    options.receive(ReceiveOptions::new().accept_timeout(Some(Duration::from_secs(10))));
                let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;
                let pending = arrival.load(|_, list| list.in_memory_of(&handed.take()?))?;
                let confirmed = pending.confirm()?;
                let at = Instant::now();
                confirmed.finish();
                Ok(at)
            });
            let left = self.leave(&path);
            let received = receives.join().map_err(|_| "the destination panicked")?;
            left?;
            Ok::<_, crate::Error>(received?)
        })?;
        Ok(confirmed - self.stopped)
    }

    fn leave(&mut self, path: &Path) -> Result<()> {
        let memory =
            SharedMemory { block: name()?, file: self.file.try_clone()?, offset: 0, length: self.bytes };
        let connector = HandOver::new(&Address::Unix(path.to_owned()), &self.blocks, vec![memory])?;
        let machine = Configuration::new(MachineType::new("multifd-bench")?);
        let options = SourceOptions::new(Configuration { ignore_shared: true, ..machine }).channels(0);
        let source = Source::new(self.blocks.clone(), options, &Stop::new())?;
        source.migrate(connector, &mut NeverDirty, self)?;
        Ok(())
    }
}

fn name() -> Result<BlockName> {
    Ok(BlockName::new("ram").ok_or("a name")?)
}

impl Guest for Machine {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DeviceName::from_static("vcpu"), 8)]
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.stopped = Instant::now();
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let name = DeviceName::from_static("vcpu");
        Ok(vec![DeviceSection { name, instance_id: 0, version: 1, data: vec![7; 8] }])
    }
    fn resume(&mut self) {}
}

/// The longest downtime that is wanted.
const DOWNTIME: Duration = Duration::from_millis(20);
