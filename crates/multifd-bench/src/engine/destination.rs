//! The engine as a destination: it receives any machine into fresh memory.

use std::{
    io::{self, BufRead, Write},
    path::PathBuf,
    sync::Arc,
};

use clap::Args;
use multifd::{
    channel::{
        Address, Listen, Listener, Stop,
        tls::{ServerCredentials, TlsListener},
    },
    ram::RamBlocks,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    incoming::Expected,
};

use super::{Loaded, beyond::peak_beyond, blocks::wrong, file, raw};
use crate::{Result, contents::Contents};

#[derive(Debug, Args)]
pub(crate) struct DestinationArgs {
    /// The folder with certificates, for TLS
    #[arg(long)]
    tls: Option<PathBuf>,
    /// Expected contents of the block of RAM
    #[arg(long, value_enum)]
    contents: Option<Contents>,
    /// Receive with sockets only, over this number of connections
    #[arg(long)]
    raw: Option<u8>,
    /// Load this mapped-ram file on command
    #[arg(long)]
    file: Option<PathBuf>,
    /// Number of channels for loading a file
    #[arg(long, default_value_t = 4)]
    channels: u8,
    /// Bytes of RAM to receive with sockets only
    #[arg(long, default_value_t = 1 << 30)]
    ram: u64,
    /// Where to listen
    #[arg(default_value = "tcp:127.0.0.1:0")]
    listen: Address,
}

/// Prints its address, then what it got. On request it then checks that this is what was expected.
pub(crate) fn destination(args: &DestinationArgs) -> Result<()> {
    let mut out = io::stdout().lock();
    if let Some(path) = &args.file {
        writeln!(out, "ready")?;
        io::stdin().lock().read_line(&mut String::new())?;
        let blocks = file::restore(path, args.channels)?;
        writeln!(out, "loaded")?;
        return tell(&blocks, args, &mut out);
    }
    let listener = Listener::bind(&args.listen)?;
    writeln!(out, "{}", listener.local_address())?;
    // The time is measured until this line, so nothing else is done before.
    let blocks = match args.raw {
        Some(channels) => {
            let contents = args.contents.unwrap_or(Contents::Nonzero);
            let blocks = raw::receive(listener, args.ram, contents, channels)?;
            writeln!(out, "loaded")?;
            blocks
        }
        None => take_in(listener, args, || Ok(writeln!(out, "loaded")?))?,
    };
    tell(&blocks, args, &mut out)
}

/// Prints what it received and, on request, whether it is right.
fn tell(blocks: &RamBlocks, args: &DestinationArgs, out: &mut impl Write) -> Result<()> {
    writeln!(out, "{}", serde_json::to_string(&Loaded { beyond: peak_beyond(blocks)? })?)?;

    let mut line = String::new();
    if io::stdin().lock().read_line(&mut line)? > 0 {
        writeln!(
            out,
            "{}",
            args.contents
                .map_or(Ok(None), |contents| wrong(blocks, contents))?
                .map_or_else(|| "right".into(), |page| format!("page {page} is wrong"))
        )?;
    }
    Ok(())
}

/// Calls `loaded` when everything has arrived and the source was informed.
fn take_in(
    listener: Listener,
    args: &DestinationArgs,
    loaded: impl FnOnce() -> Result<()>,
) -> Result<Arc<RamBlocks>> {
    let stop = Stop::new();
    let listener: Box<dyn Listen> = match &args.tls {
        None => Box::new(listener),
        Some(folder) => {
            Box::new(TlsListener::new(Box::new(listener), ServerCredentials::load(folder, Vec::new())?))
        }
    };
    let arrival = Arrival::listen(listener, ArrivalOptions::new(Expected::AnyMachine), &stop)?.accept()?;
    let confirmed = arrival.load(|_, list| list.in_new_memory())?.confirm()?;
    loaded()?;
    let blocks = confirmed.blocks().clone();
    confirmed.finish();
    Ok(blocks)
}
