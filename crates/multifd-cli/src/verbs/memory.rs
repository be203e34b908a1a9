//! Opens the guest-physical memory of a stored machine, for the verbs that read it.

use multifd::channel::Stop;
use qemu_stream::physical::{PhysicalMap, PhysicalMemory};

use crate::{
    args::PhysicalArgs,
    file_address::FileAddress,
    output::{
        outcome::{Failure, While},
        outlet::say,
    },
    stored::{Open, Opened},
};

/// A machine and its memory.
pub(super) struct Memory {
    pub(super) machine: Opened,
    pub(super) memory: PhysicalMemory,
}

impl Memory {
    /// Opens it. Blocks of RAM without a known address are reported, and left out.
    pub(super) fn open(
        file: &FileAddress,
        args: &PhysicalArgs,
        quiet: bool,
        stop: &Stop,
    ) -> Result<Self, Failure> {
        let machine = Open::new(stop).quiet(quiet).no_verify(args.no_verify).machine(file)?;
        let unknown = |error| {
            let doing = format!("cannot find the memory of {file}; --place ADDRESS=BLOCK gives an address");
            While::new(doing, error)
        };
        let map = PhysicalMap::of(&machine, &args.places).map_err(unknown)?;
        if !quiet {
            for entry in map.unplaced(&machine) {
                say(&format!(
                    "block {} is left out, because its address is not in the file (hot-plugged?): --place ADDRESS={}",
                    entry.name, entry.name
                ));
            }
        }
        let memory = PhysicalMemory::new(&machine, map).map_err(|error| file.unreadable(error))?;
        Ok(Self { machine, memory })
    }
}
