//! The command line of `multifd inspect`.

use std::{ffi::OsString, path::PathBuf};

use clap::{
    Args as ClapArgs,
    builder::{OsStringValueParser, TypedValueParser},
};

use super::shared::file_address;
use crate::file_address::{FileAddress, file_path};

#[derive(Debug, ClapArgs)]
pub(crate) struct InspectArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    /// Show the state of a device as fields with names: NAME, or NAME:INSTANCE
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["xml", "extract"])]
    pub(crate) device: Option<String>,
    /// Show the state of all devices as fields with names
    #[arg(long, conflicts_with_all = ["device", "xml", "extract"])]
    pub(crate) devices: bool,
    /// Print the XML of the guest in a save image of libvirt
    #[arg(long, conflicts_with_all = ["json", "extract"])]
    pub(crate) xml: bool,
    /// Write the RAM of this block to OUT, as raw bytes; zero pages become holes
    #[arg(long, value_name = "BLOCK", requires = "out", conflicts_with = "json")]
    pub(crate) extract: Option<OsString>,
    /// Draw the throughput and the waits of each connection of a recording, into this file
    #[arg(long, value_name = "SVG", conflicts_with_all = ["json", "device", "devices", "xml", "extract"])]
    pub(crate) svg: Option<PathBuf>,
    /// Replace OUT or SVG if it exists. WARNING: the old data is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Read FILE although it is damaged: do not compare it with its digests
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// File to read: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// File for the RAM of BLOCK, readable by its owner only; - = standard output
    #[arg(requires = "extract", value_parser = out_path())]
    pub(crate) out: Option<PathBuf>,
}

/// The path of a file to be written; `-` is accepted, too.
fn out_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(file_path)
}
