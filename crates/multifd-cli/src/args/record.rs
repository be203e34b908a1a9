//! The command lines of `multifd record` and `multifd replay`.

use std::path::PathBuf;

use clap::{
    Args as ClapArgs,
    builder::{OsStringValueParser, TypedValueParser},
};
use multifd::channel::Address;

use super::shared::{destination_address, listen_address, plain_file_address};
use crate::file_address::{FileAddress, file_path};

#[derive(Debug, ClapArgs)]
pub(crate) struct RecordArgs {
    /// Replace OUT if it exists. WARNING: the old data is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    pub(crate) json: bool,
    /// Print errors and the address only
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Address to listen on for the source: tcp:HOST:PORT, unix:PATH, vsock:CID:PORT or fd:N
    #[arg(value_parser = listen_address)]
    pub(crate) listen: Address,
    /// Address of the destination: tcp:HOST:PORT, unix:PATH or vsock:CID:PORT
    #[arg(value_parser = destination_address)]
    pub(crate) target: Address,
    /// File for the recording, readable by its owner only
    #[arg(value_parser = out_path())]
    pub(crate) out: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ReplayArgs {
    /// Send as fast as the destination receives; default: at the recorded times
    #[arg(long)]
    pub(crate) fast: bool,
    /// Print errors only
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// File with the recording: a path, or file:PATH,offset=N
    #[arg(value_parser = plain_file_address())]
    pub(crate) file: FileAddress,
    /// Address of the destination: tcp:HOST:PORT, unix:PATH or vsock:CID:PORT
    #[arg(value_parser = destination_address)]
    pub(crate) address: Address,
}

fn out_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(file_path)
}
