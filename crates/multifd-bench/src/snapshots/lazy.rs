//! Lazy restores: when the guest's first access is answered, and when all of RAM is there, beside a plain restore.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use multifd::{
    channel::Stop,
    ram::{NeverDirty, PageIndex, PagerOptions},
};
use qemu_stream::mapped_ram::{Restore, StoredMachine};

use super::{
    args::SnapshotsArgs,
    memory::{Kind, Ram, block, chill, enough},
    table::{Row, Table, median, time},
};
use crate::{Result, delta, free};

/// Where the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Memory,
    /// On a disk, and in the page cache.
    Cached,
    /// On a disk only.
    Disk,
}

pub(super) fn measure(args: &SnapshotsArgs, table: &mut Table) -> Result<()> {
    for bytes in args.ram.iter().map(|ram| ram << 20) {
        for (place, folder, text) in [
            (Place::Memory, &args.folder, "in /dev/shm"),
            (Place::Cached, &args.disk, "on the disk, and in the page cache"),
            (Place::Disk, &args.disk, "on the disk"),
        ] {
            let is_whole = bytes == args.least();
            if place != Place::Memory && !is_whole {
                continue;
            }
            // The guest and the file; then the file and another guest.
            if let Err(error) = enough(2 * bytes) {
                let setting = format!("{} MiB, file {text}", bytes >> 20);
                table.add(Row::new("first instruction", &setting).without(&error.to_string()));
                continue;
            }
            let folder = tempfile::tempdir_in(folder)?;
            let path = folder.path().join("machine");
            free::warm(2 * bytes)?;
            {
                let ram = Ram::filled(Kind::Anonymous, bytes)?;
                delta::capture(&ram.blocks, &path, None, &mut NeverDirty, true, 2)?;
            }
            for kind in [Kind::Small, Kind::Anonymous] {
                let setting = format!("{} MiB, {}, file {text}", bytes >> 20, kind.name());
                compare(args, table, (&path, place), (kind, bytes), &setting, is_whole)?;
            }
            if place == Place::Memory {
                huge(args, table, &path, bytes)?;
            }
        }
    }
    Ok(())
}

fn compare(
    args: &SnapshotsArgs,
    table: &mut Table,
    (path, place): (&Path, Place),
    (kind, bytes): (Kind, u64),
    setting: &str,
    is_whole: bool,
) -> Result<()> {
    let (mut plain, mut firsts, mut lazy) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let cool = || if place == Place::Disk { chill(path) } else { Ok(()) };
        if is_whole {
            cool()?;
            free::warm(bytes)?;
            let begun = Instant::now();
            let machine = StoredMachine::open(path, 0)?;
            let ram = Ram::new(kind, bytes)?;
            Restore::new(&machine).run(&ram.blocks, &Stop::new())?;
            plain.push(begun.elapsed());
            drop(ram);
        }
        cool()?;
        free::warm(bytes)?;
        let (first, all) = restore(path, kind, bytes, is_whole)?;
        firsts.push(first);
        lazy.push(all);
    }
    let row = Row::new("first instruction", setting).at_most(median(firsts), FIRST);
    table.add(row.note("from opening the file to the first answered access"));
    if is_whole {
        let (plain, lazy) = (median(plain), median(lazy));
        let note = format!("{} against {}", time(lazy), time(plain));
        let times = lazy.as_secs_f64() / plain.as_secs_f64();
        table.add(Row::new("lazy restore against a plain one", setting).times(times, 1.2).note(note));
    }
    Ok(())
}

/// Into huge pages.
fn huge(args: &SnapshotsArgs, table: &mut Table, path: &Path, bytes: u64) -> Result<()> {
    let setting = format!("{} MiB, huge pages, file in /dev/shm", bytes >> 20);
    let mut firsts = Vec::new();
    for _ in 0..args.rounds {
        match restore(path, Kind::Huge, bytes, false) {
            Ok((first, _)) => firsts.push(first),
            Err(error) => {
                table.add(Row::new("first instruction", &setting).without(&error.to_string()));
                return Ok(());
            }
        }
    }
    let note = "without the time in which the system provides huge pages";
    table.add(Row::new("first instruction", &setting).at_most(median(firsts), FIRST).note(note));
    Ok(())
}

/// The time until the first access was answered, and until all of RAM is there.
fn restore(path: &Path, kind: Kind, bytes: u64, is_whole: bool) -> Result<(Duration, Duration)> {
    let huge = if kind == Kind::Huge { Some(Ram::new(kind, bytes)?) } else { None };
    let begun = Instant::now();
    let machine = StoredMachine::open(path, 0)?;
    let ram = match huge {
        Some(ram) => ram,
        None => Ram::new(kind, bytes)?,
    };
    let pager = Restore::new(&machine).lazy(&ram.blocks, PagerOptions::new())?;
    let page = block(&ram.blocks).pages() * 5 / 7;
    let mut bytes = [0; 4096];
    ram.block().slice(PageIndex(page), 1).ok_or("a page of the block")?.copy_to(&mut bytes);
    let first = begun.elapsed();
    if bytes[..8] != (page + 1).to_be_bytes() {
        return Err("the restored page differs from the captured one".into());
    }
    if is_whole {
        pager.finish(None)?;
    }
    Ok((first, begun.elapsed()))
}

/// The latest first instruction that is wanted.
const FIRST: Duration = Duration::from_millis(20);
