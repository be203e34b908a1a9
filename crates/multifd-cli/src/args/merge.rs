//! The command line of `multifd merge`.

use std::num::NonZero;

use clap::Args as ClapArgs;

use super::{
    run::RunArgs,
    shared::{OutputArgs, file_address, label, plain_file_address, threads},
};
use crate::file_address::FileAddress;

#[derive(Debug, ClapArgs)]
pub(crate) struct MergeArgs {
    /// Number of threads that copy, 1 to 255
    #[arg(long, value_name = "N", default_value = "4", value_parser = threads)]
    pub(crate) threads: NonZero<u8>,
    /// Read and write pages with direct I/O, past the page cache, if the file systems support it
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Replace OUT if it exists; with an offset, replace the data after the offset. WARNING: the old data is lost, and deltas of
    /// an old OUT cannot be read any more
    #[arg(long)]
    pub(crate) force: bool,
    /// Text to store in OUT, shown by multifd inspect; default: that of the last FILE
    #[arg(long, value_name = "TEXT", value_parser = label)]
    pub(crate) label: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Files to merge, oldest first: BASE DELTA..., each a path, or file:PATH,offset=N. A base that is not given is looked for
    /// where its delta names it
    #[arg(value_name = "FILE", value_parser = file_address(), required = true, num_args = 1..)]
    pub(crate) files: Vec<FileAddress>,
    /// File to write: a path, or file:PATH,offset=N to keep the first N bytes and write after them
    #[arg(value_parser = plain_file_address(), required = true)]
    pub(crate) out: FileAddress,
}
