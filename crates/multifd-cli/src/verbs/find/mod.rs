//! `multifd find`: the places of bytes in guest-physical memory.
//!
//! Exit codes as `grep`: 0 found, 1 not found, 2 failed.

pub(super) mod search;

use std::{num::NonZero, thread};

use multifd::channel::Stop;
use qemu_stream::physical::PhysicalAddress;
use serde::Serialize;

use self::search::Search;
use super::{memory::Memory, read::line};
use crate::{
    args::FindArgs,
    interrupt,
    output::{
        outcome::Failure,
        outlet::{print_json, print_lines},
    },
};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Found {
    addresses: Vec<u64>,
    /// There may be more.
    limited: bool,
}

pub(crate) fn run(args: &FindArgs) -> Result<(), Failure> {
    find(args).map_err(Failure::in_comparison)?.then_some(()).ok_or(Failure::Different)
}

fn find(args: &FindArgs) -> Result<bool, Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let Memory { memory, .. } = Memory::open(&args.file, &args.physical, args.json, &stop)?;
    let search = Search::new(&memory, args.pattern(), threads(args.threads));
    let limit = if args.limit == 0 { u64::MAX } else { args.limit };
    let (mut count, mut addresses) = (0, Vec::new());
    search.run(&stop, |found| {
        let left = usize::try_from(limit - count).unwrap_or(usize::MAX);
        let found = found.get(..left).unwrap_or(found);
        count += found.len() as u64;
        if args.json {
            addresses.extend(found.iter().map(|address| address.0));
        } else {
            print_lines(&found.iter().map(|address| shown(&memory, *address)).collect::<Vec<_>>())?;
        }
        Ok(count < limit)
    })?;
    if args.json {
        print_json(&Found { addresses, limited: count == limit })?;
    }
    Ok(count > 0)
}

/// One for each processor, unless the user has given a number.
pub(super) fn threads(wanted: Option<NonZero<u8>>) -> NonZero<u8> {
    wanted.unwrap_or_else(|| {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        u8::try_from(processors).ok().and_then(NonZero::new).unwrap_or(NonZero::<u8>::MAX)
    })
}

/// A place with the first bytes there.
fn shown(memory: &qemu_stream::physical::PhysicalMemory, at: PhysicalAddress) -> String {
    let piece = memory.map().pieces(at, 16).next();
    let length = piece.and_then(|piece| usize::try_from(piece.length).ok()).unwrap_or(0);
    let mut row = vec![0; length];
    match memory.read(at, &mut row) {
        Ok(()) => line(at.0, &row),
        Err(_) => format!("{:016x}", at.0),
    }
}
