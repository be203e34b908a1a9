//! What is measured, and where files are written.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(crate) struct SnapshotsArgs {
    /// Not used: the library is measured
    #[arg(long, hide = true)]
    program: Option<PathBuf>,
    /// RAM of the guest in MiB; can be repeated. The first is used where the size makes no difference
    #[arg(long, default_values_t = [1024, 4096, 8192])]
    pub(super) ram: Vec<u64>,
    /// How often everything is measured; medians are shown
    #[arg(long, default_value_t = 5)]
    pub(super) rounds: usize,
    /// Where files in memory are written
    #[arg(long, default_value = "/dev/shm")]
    pub(super) folder: PathBuf,
    /// Where files on a disk are written
    #[arg(long, default_value = "target")]
    pub(super) disk: PathBuf,
    /// How many threads copy, where that makes a difference; by default as many as the library takes
    #[arg(long)]
    pub(super) threads: Option<usize>,
    /// Measure only this; can be repeated
    #[arg(long, value_enum)]
    pub(super) only: Vec<Part>,
}

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    Moment,
    Lazy,
    Faults,
    Delta,
    HandedOver,
}

impl SnapshotsArgs {
    /// The size that is used where the size makes no difference, in bytes.
    pub(super) fn least(&self) -> u64 {
        self.ram.first().copied().unwrap_or(1024) << 20
    }
}
