//! The engine as a source: RAM filled by itself or taken out of a file, and sent as often as it is told.

use std::{
    fs::File,
    io::{self, BufRead, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use multifd::{
    Method, SendOptions, Sender,
    channel::{
        Address, Connect, Stop, Stream,
        tls::{ClientCredentials, TlsConnector},
    },
    live::{DeviceInfo, DeviceSection, Guest, Main, MigrateOptions, Migration, RunState, ZeroPageDetection},
    ram::{BlockName, Mapping, Memory, NeverDirty, PageBitmap, PageIndex, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::MappedRamFile,
    outgoing::{MainStream, Options, Outgoing},
};

use super::{Go, RAM, Sent, beyond::peak_beyond, file, raw};
use crate::{
    Result,
    contents::{Contents, PAGE},
};

#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// Bytes of RAM
    #[arg(long, default_value_t = 1 << 30)]
    ram: u64,
    /// What RAM holds
    #[arg(long, value_enum, default_value_t = Contents::Nonzero)]
    contents: Contents,
    /// By sockets alone
    #[arg(long)]
    raw: bool,
    /// The same, with pages lent to the sockets
    #[arg(long)]
    lent: bool,
    /// Be the machine in this mapped-ram file
    #[arg(long)]
    machine: Option<PathBuf>,
}

/// Says `ready`, then migrates once for each line of standard input.
pub(crate) fn source(args: &SourceArgs) -> Result<()> {
    let machine = args
        .machine
        .as_ref()
        .map(|path| MappedRamFile::open(File::open(path)?, 0).map_err(crate::Error::from));
    let machine = machine.transpose()?;
    let blocks = Arc::new(match &machine {
        Some(file) => load(file)?,
        None => filled(args)?,
    });
    let mut out = io::stdout().lock();
    writeln!(out, "ready")?;
    for line in io::stdin().lock().lines() {
        let go: Go = serde_json::from_str(&line?)?;
        let sent = if let Go { address, channels, file: Some(into), .. } = &go {
            file::capture(address, *into, *channels, &blocks)?
        } else if args.raw || args.lent {
            let transferred = raw::send(&go, &blocks, args.contents, args.lent)?;
            Sent { transferred, beyond: peak_beyond(&blocks)? }
        } else {
            migrate(&go, machine.as_ref(), &blocks)?
        };
        writeln!(out, "{}", serde_json::to_string(&sent)?)?;
    }
    Ok(())
}

fn filled(args: &SourceArgs) -> Result<RamBlocks> {
    let memory = Memory::Mapped(Mapping::anonymous(args.ram)?);
    let name = BlockName::new(RAM).ok_or("a block's name")?;
    let block = RamBlock::new(name, args.ram, PageSize::KIB_4, memory)?;
    let mut page = [0; PAGE];
    for index in (0..block.pages()).filter(|_| args.contents != Contents::Untouched) {
        args.contents.fill(index, &mut page);
        block.slice(PageIndex(index), 1).ok_or("a page")?.copy_from(&page);
    }
    Ok(RamBlocks::new(vec![block])?)
}

/// The file's machine in memory, as a monitor would have it. Pages that are not in the file stay untouched.
fn load(file: &MappedRamFile) -> Result<RamBlocks> {
    let mut blocks = Vec::new();
    for ((index, entry), place) in file.blocks().iter().zip(file.places()) {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length)?);
        let block = RamBlock::new(entry.name.clone(), entry.used_length, place.page_size, memory)?;
        let present = PageBitmap::new(place.pages());
        present.merge(file.bitmap(index)?);
        let mut page = vec![0; place.page_size.bytes()];
        for index in (0..place.pages()).map(PageIndex).filter(|page| present.contains(*page)) {
            let at = place.page_offset(index).ok_or("a page of the file")?;
            std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut page, at)?;
            block.slice(index, 1).ok_or("a page")?.copy_from(&page);
        }
        blocks.push(block);
    }
    Ok(RamBlocks::new(blocks)?)
}

fn migrate(go: &Go, machine: Option<&MappedRamFile>, blocks: &Arc<RamBlocks>) -> Result<Sent> {
    let stop = Stop::new();
    let connector: Arc<dyn Connect> = match &go.tls {
        None => Arc::new(go.address.parse::<Address>()?),
        Some(folder) => {
            let credentials = ClientCredentials::load(folder.as_ref(), "localhost")?;
            Arc::new(TlsConnector::new(Arc::new(go.address.parse::<Address>()?), credentials))
        }
    };
    let main = Stream::new(connector.connect(&stop, Duration::from_secs(30))?);
    let mut main = match machine {
        None => {
            let configuration = Configuration::new(MachineType::new("multifd-bench")?);
            MainStream::of_guest(Outgoing::new(main, Options::new(configuration))?, &stop)
        }
        Some(file) => {
            let configuration = file.configuration().ok_or("the file has no configuration")?;
            let options = Options::new(configuration.clone());
            let mode = file.sync_mode().or(options.chosen_sync_mode());
            let options = options
                .section(file.section())
                .footers(file.devices().has_footers())
                .switchover_start(file.switchover_start())
                .sync_mode(mode);
            MainStream::of_capture(
                Outgoing::new(main, options)?,
                file.blocks().clone(),
                file.devices().clone(),
                &stop,
            )
        }
    };
    let method: Method = go.method.parse()?;
    let options = SendOptions::new().channels(go.channels).method(method).zlib_level(1).zstd_level(1);
    let mut sender = Sender::new(options, blocks.clone(), stop.clone())?;
    sender.set_up(connector)?;
    in_one_pass(sender, &mut main, blocks)
}

/// Sends all of RAM, over the sender's connections or into its file.
pub(super) fn in_one_pass(sender: Sender, main: &mut dyn Main, blocks: &Arc<RamBlocks>) -> Result<Sent> {
    let options = MigrateOptions::new()
        .zero_page_detection(ZeroPageDetection::Multifd)
        .downtime_limit(Duration::from_secs(2000));
    let migration = Migration::new(options, sender)?;
    let info = migration.run(main, &mut NeverDirty, &mut Stopped)?;
    Ok(Sent { transferred: info.ram.transferred, beyond: peak_beyond(blocks)? })
}

/// A guest that does not run.
struct Stopped;

impl Guest for Stopped {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }
    fn resume(&mut self) {}
}
