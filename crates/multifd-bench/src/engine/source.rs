//! The engine as a source: RAM is filled here or loaded from a file, and sent once for each command.

use std::{
    fs::File,
    io::{self, BufRead, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use multifd::{
    Method, SendOptions,
    channel::{
        Address, Connect, Stop,
        tls::{ClientCredentials, TlsConnector},
    },
    ram::{BlockName, Mapping, Memory, NeverDirty, PageIndex, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::MappedRamFile,
    source::{Source, SourceOptions},
};

use super::{
    Go, RAM, Sent,
    beyond::peak_beyond,
    file,
    one_pass::{Stopped, one_pass},
    raw,
};
use crate::{
    Result,
    contents::{Contents, PAGE},
};

#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// Bytes of RAM
    #[arg(long, default_value_t = 1 << 30)]
    ram: u64,
    /// Contents of RAM
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

/// Prints `ready`, then migrates once for each line of standard input.
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
            migrate(&go, machine.as_ref(), &blocks, STALL_TIMEOUT)?
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

/// Loads the file's machine into memory, as a monitor would. Pages that are not in the file stay untouched.
fn load(file: &MappedRamFile) -> Result<RamBlocks> {
    let mut blocks = Vec::new();
    for ((index, entry), place) in file.blocks().iter().zip(file.places()) {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length)?);
        let block = RamBlock::new(entry.name.clone(), entry.used_length, place.page_size, memory)?;
        let present = file.bitmap(index)?;
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

fn migrate(
    go: &Go,
    machine: Option<&MappedRamFile>,
    blocks: &Arc<RamBlocks>,
    stall_timeout: Duration,
) -> Result<Sent> {
    let stop = Stop::new();
    let connector: Arc<dyn Connect> = match &go.tls {
        None => Arc::new(go.address.parse::<Address>()?),
        Some(folder) => {
            let credentials = ClientCredentials::load(folder.as_ref(), "localhost")?;
            Arc::new(TlsConnector::new(Arc::new(go.address.parse::<Address>()?), credentials))
        }
    };
    let options = match machine {
        None => SourceOptions::new(Configuration::new(MachineType::new("multifd-bench")?)),
        Some(file) => SourceOptions::of_file(file),
    };
    let method: Method = go.method.parse()?;
    let send = SendOptions::new().method(method).level(method, 1);
    let options =
        options.channels(go.channels).send(send).migrate(one_pass()).stall_timeout(Some(stall_timeout));
    let source = Source::new(blocks.clone(), options, &stop)?;
    let info = source.migrate(connector, &mut NeverDirty, &mut Stopped)?;
    Ok(Sent { transferred: info.ram.transferred, beyond: peak_beyond(blocks)? })
}

/// The time in which a destination must read something.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use multifd_testkit::{certificates, silent::Silent};

    use super::*;

    #[test]
    fn destination_that_reads_nothing_is_given_up() {
        let folder = tempfile::tempdir().expect("a folder");
        certificates::write_both(folder.path()).expect("certificates");
        let args =
            SourceArgs { ram: 64 << 20, contents: Contents::Nonzero, raw: false, lent: false, machine: None };
        let blocks = Arc::new(filled(&args).expect("RAM"));
        for (tls, channels) in [(false, 0), (false, 4), (true, 0), (true, 4)] {
            let tls = tls.then(|| folder.path());
            let silent = Silent::start(tls).expect("listening");
            let tls = tls.map(|tls| tls.to_str().expect("UTF-8").to_owned());
            let go = Go { address: silent.address(), channels, method: "none".into(), tls, file: None };
            let begun = Instant::now();
            let error = migrate(&go, None, &blocks, Duration::from_secs(1)).expect_err("given up");
            let text = error.to_string();
            assert!(begun.elapsed() < Duration::from_secs(8), "{channels} channels: {text}");
            let stalled = multifd::error::chain(&*error).to_string();
            assert!(stalled.contains("accepted no data for 1 s"), "{channels} channels: {stalled}");
        }
    }
}
