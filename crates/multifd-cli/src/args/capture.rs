//! The command line of `multifd capture`.

use std::time::Duration;

use clap::{Args as ClapArgs, builder::ArgPredicate};
use multifd::{
    Method,
    channel::Address,
    parameters::{DOWNTIME_LIMIT, STALL_TIMEOUT},
};

use super::{
    run::RunArgs,
    shared::{
        OutputArgs, default_seconds, label, limit, listen_address, milliseconds, number, plain_file_address,
        qmp_address, rate, seconds,
    },
};
use crate::{file_address::FileAddress, qmp::QmpAddress};

#[derive(Debug, ClapArgs)]
pub(crate) struct CaptureArgs {
    /// Number of channels, 0 to 255; 0 = main alone, the default with --postcopy-after
    #[arg(
        long,
        alias = "channels",
        value_name = "N",
        default_value_t = 4,
        default_value_if("postcopy_after", ArgPredicate::IsPresent, "0"),
        value_parser = number::<u8>(0, 255)
    )]
    pub(crate) multifd_channels: u8,
    /// Compression on the way: none, zlib or zstd; FILE is not compressed
    #[arg(long, value_name = "METHOD", default_value = Method::None.as_str())]
    pub(crate) multifd_compression: Method,
    /// Limit in bytes per second while the guest runs, for example 100M (M = 1024 K); 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rate)]
    pub(crate) max_bandwidth: u64,
    /// Longest planned downtime of the guest, in milliseconds or with a unit (2s); default: QEMU's setting
    #[arg(long, value_name = "TIME", value_parser = milliseconds(DOWNTIME_LIMIT))]
    pub(crate) downtime_limit: Option<Duration>,
    /// Slow the guest down step by step if it writes too fast
    #[arg(long)]
    pub(crate) auto_converge: bool,
    /// Switch to post-copy if the guest has not been stopped after this time, in seconds or with a unit (500ms, 2m): the guest
    /// is stopped then, and the rest of its memory follows. WARNING: if this program is killed after the switch, the guest stays
    /// stopped for good
    #[arg(long, value_name = "TIME", value_parser = seconds, conflicts_with = "no_return_path")]
    pub(crate) postcopy_after: Option<Duration>,
    /// Do not confirm to QEMU that FILE is complete. WARNING: the guest is stopped even if FILE cannot be completed, and only
    /// this program lets it continue
    #[arg(long)]
    pub(crate) no_return_path: bool,
    /// Address at which QEMU connects to this program; default: a private unix socket, or the address of a TCP connection
    /// to QMP
    #[arg(long, value_name = "ADDRESS", value_parser = listen_address)]
    pub(crate) listen: Option<Address>,
    /// Time limit for a source that sends nothing while data is expected, in seconds or with a unit (500ms, 2m); 0 = no
    /// limit
    #[arg(long, value_name = "TIME", default_value = default_seconds(STALL_TIMEOUT), value_parser = seconds)]
    stall_timeout: Duration,
    /// Command to run with /bin/sh when FILE is complete and before the guest continues; MULTIFD_FILE has the path of FILE.
    /// If it fails, the guest continues and the exit code is 1
    #[arg(long, value_name = "COMMAND")]
    pub(crate) before_continue: Option<String>,
    /// Leave the guest stopped
    #[arg(long, conflicts_with = "quit")]
    pub(crate) leave_paused: bool,
    /// End QEMU
    #[arg(long)]
    pub(crate) quit: bool,
    /// Write pages from channels with direct I/O, past the page cache, if the file system supports it
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Replace FILE if it exists; with an offset, replace the data after the offset. WARNING: the old data is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Write a delta: only the pages that differ from those in BASE, which is a whole file or a delta: a path, or
    /// file:PATH,offset=N. FILE then needs BASE, unchanged, at the same place as seen from FILE
    #[arg(long, value_name = "BASE", value_parser = plain_file_address())]
    pub(crate) base: Option<FileAddress>,
    /// Text to store in FILE, shown by multifd inspect
    #[arg(long, value_name = "TEXT", value_parser = label)]
    pub(crate) label: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// QMP socket of the running QEMU: unix:PATH, a path, or tcp:HOST:PORT
    #[arg(value_parser = qmp_address)]
    pub(crate) qmp: QmpAddress,
    /// File to write: a path, or file:PATH,offset=N to keep the first N bytes and write after them
    #[arg(value_parser = plain_file_address())]
    pub(crate) file: FileAddress,
}

impl CaptureArgs {
    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        limit(self.stall_timeout)
    }
}
