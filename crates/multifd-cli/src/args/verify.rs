//! The command line of `multifd verify`.

use std::num::NonZero;

use clap::Args as ClapArgs;

use super::shared::{OutputArgs, file_address, threads};
use crate::file_address::FileAddress;

#[derive(Debug, ClapArgs)]
pub(crate) struct VerifyArgs {
    /// Add digests to a FILE that has none, such as one that QEMU wrote. What it contains now is taken to be right
    #[arg(long)]
    pub(crate) add: bool,
    /// Number of threads that read, 1 to 255
    #[arg(long, value_name = "N", default_value = "4", value_parser = threads)]
    pub(crate) threads: NonZero<u8>,
    /// Read past the page cache, so that the disk itself is tested
    #[arg(long)]
    pub(crate) direct_io: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// File to verify: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
}
