use std::{
    error::Error as StdError,
    fs::{self, File},
    path::Path,
    time::Duration,
};

use multifd::ram::CopierOptions;
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::{Capture, CaptureOptions},
};

use crate::machine::Machine;

type Result<T> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

/// Saves the machine as it is now. Returns how long its guest was stopped; it runs again when this returns, also after an error.
pub fn save_moment(machine: &mut Machine, path: &Path) -> Result<Duration> {
    // 1. A file with a temporary name until it is complete.
    let unfinished = path.with_extension("unfinished");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
    let configuration = Configuration::new(MachineType::new("my-vmm-1")?);
    let blocks = machine.blocks.clone();
    let capture = Capture::of_guest(file, configuration, &blocks, &CaptureOptions::new().digests(true))?;

    // 2. The guest is stopped, its devices are saved, and it runs again. A file that is silent for 5 s ends the capture.
    let options = CopierOptions::new().silence(Duration::from_secs(5));
    let mut capture = capture.at_moment(&blocks, machine, options)?;

    // 3. Its memory is copied while it runs.
    capture.finish(None)?;
    fs::rename(unfinished, path)?;
    Ok(capture.pause())
}
