//! The pages that a guest needs at once, as an earlier start out of the same file has shown: `FILE.working-set`.
//!
//! A line of text for each run of pages. It only says what is sent first, so a stale or damaged one costs time and nothing else.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use multifd::ram::{PageBitmap, PageIndex};
use qemu_stream::{format::BlockList, outgoing::postcopy::PostcopySource};
use tempfile::Builder;

use crate::{file_address::FileAddress, output::outlet::shown};

/// The place of the working set of a file.
pub(crate) struct WorkingSet {
    path: PathBuf,
}

impl WorkingSet {
    /// The place beside `file`.
    pub(crate) fn of(file: &FileAddress) -> Self {
        let mut name = file.path().as_os_str().to_owned();
        if file.offset() > 0 {
            name.push(format!(".{:#x}", file.offset()));
        }
        name.push(".working-set");
        Self { path: name.into() }
    }

    /// Makes `source` send the recorded pages before the guest starts, if there are some. Returns their number.
    pub(crate) fn apply(&self, source: &mut PostcopySource, blocks: &BlockList) -> u64 {
        match self.read(blocks) {
            Ok(sets) => {
                let sets = blocks.iter().map(|(index, _)| index).zip(&sets);
                sets.map(|(index, pages)| {
                    source.send_first(index, pages);
                    pages.count()
                })
                .sum()
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!("{} is not used: {error}", shown(&self.path));
                }
                0
            }
        }
    }

    fn read(&self, blocks: &BlockList) -> io::Result<Vec<PageBitmap>> {
        let mut text = String::new();
        File::open(&self.path)?.take(LONGEST).read_to_string(&mut text)?;
        parse(&text, blocks)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is not a working set"))
    }

    /// Records the pages that were needed, to be sent first at the next start.
    pub(crate) fn record(&self, source: &PostcopySource, blocks: &BlockList) {
        let text = describe(source.needed(), blocks);
        if let Err(error) = self.write(&text) {
            tracing::warn!("cannot record the working set in {}: {error}", shown(&self.path));
        }
    }

    /// Replaces the file, so that nobody reads half of it.
    fn write(&self, text: &str) -> io::Result<()> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut new = Builder::new().prefix(".working-set-").tempfile_in(folder.unwrap_or(Path::new(".")))?;
        new.write_all(text.as_bytes())?;
        new.persist(&self.path).map(drop).map_err(|error| error.error)
    }
}

fn describe(needed: impl Iterator<Item = PageBitmap>, blocks: &BlockList) -> String {
    let mut text = format!("{HEAD}\n");
    for ((_, entry), pages) in blocks.iter().zip(needed) {
        let name = entry.name.to_string();
        // No QEMU has such a name, and a line could not hold it.
        if name.contains(char::is_control) {
            continue;
        }
        for (first, count) in joined(&pages) {
            text += &format!("{first:#x} {count:#x} {name}\n");
        }
    }
    text
}

/// The runs of a bitmap, over the borders of its words.
fn joined(pages: &PageBitmap) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (first, count) in pages.set_runs() {
        match runs.last_mut().filter(|(start, length)| start + length == first.0) {
            Some((_, length)) => *length += count,
            None => runs.push((first.0, count)),
        }
    }
    runs
}

/// The pages of each block, at most [`MOST`] bytes of them in all. `None` if it is no working set.
fn parse(text: &str, blocks: &BlockList) -> Option<Vec<PageBitmap>> {
    let page_size = blocks.page_size();
    let pages = |used_length: u64| PageBitmap::new(page_size.whole_pages_in(used_length));
    let sets: Vec<_> = blocks.entries().iter().map(|entry| pages(entry.used_length)).collect();
    let mut left = MOST / page_size.bytes() as u64;
    let mut lines = text.lines();
    if lines.next() != Some(HEAD) {
        return None;
    }
    for line in lines {
        let mut words = line.splitn(3, ' ');
        let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        let (first, count) = (number()?, number()?);
        let name = words.next()?;
        // The machine may have other blocks than when this was written.
        let set = blocks.entries().iter().position(|entry| entry.name.to_string() == name);
        let Some(set) = set.and_then(|index| sets.get(index)) else { continue };
        let count = count.min(set.pages().saturating_sub(first)).min(left);
        if count > 0 {
            set.set_run(PageIndex(first), count);
            left -= count;
        }
    }
    Some(sets)
}

const HEAD: &str = "multifd working set 1";
/// Bytes of pages that are sent before the guest starts: some milliseconds of its start.
const MOST: u64 = 32 << 20;
/// Bytes of a file that is read.
const LONGEST: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use multifd::ram::{BlockName, PageSize};
    use qemu_stream::format::BlockEntry;

    use super::*;

    fn blocks() -> BlockList {
        let entry = |name, pages: u64| BlockEntry::new(BlockName::new(name).expect("a name"), pages * 4096);
        BlockList::new(vec![entry("pc.ram", 1 << 20), entry("vga.vram", 4)], PageSize::KIB_4).expect("a list")
    }

    fn set(pages: u64, runs: &[(u64, u64)]) -> PageBitmap {
        let set = PageBitmap::new(pages);
        runs.iter().for_each(|(first, count)| set.set_run(PageIndex(*first), *count));
        set
    }

    #[test]
    fn working_set_is_read_as_it_was_written() {
        let needed = [set(1 << 20, &[(5, 1), (60, 100), (4000, 64)]), set(4, &[(3, 1)])];
        let text = describe(needed.into_iter(), &blocks());
        assert_eq!(
            text,
            "multifd working set 1\n0x5 0x1 pc.ram\n0x3c 0x64 pc.ram\n0xfa0 0x40 pc.ram\n0x3 0x1 vga.vram\n"
        );
        let read = parse(&text, &blocks()).expect("one");
        assert_eq!(joined(&read[0]), [(5, 1), (60, 100), (4000, 64)]);
        assert_eq!(joined(&read[1]), [(3, 1)]);
    }

    #[test]
    fn stale_or_hostile_working_set_is_bounded() {
        let text = "multifd working set 1\n0x0 0x1 other\n0x3 0xff vga.vram\n0xffffffffffffffff 0xffffffffffffffff pc.ram\n\
                    0x10 0xffffffffffffffff pc.ram\n0x0 0x1 pc.ram\n";
        let read = parse(text, &blocks()).expect("one");
        assert_eq!(joined(&read[1]), [(3, 1)]);
        assert_eq!(joined(&read[0]), [(0x10, MOST / 4096 - 1)]);
        for text in [
            "",
            "multifd working set 2\n",
            "multifd working set 1\n5 1 pc.ram\n",
            "multifd working set 1\n0x5\n",
        ] {
            assert!(parse(text, &blocks()).is_none(), "{text}");
        }
    }

    #[test]
    fn absent_or_damaged_working_set_is_no_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = FileAddress::of(folder.path().join("vm"));
        let place = WorkingSet::of(&file);
        assert_eq!(place.read(&blocks()).expect_err("absent").kind(), io::ErrorKind::NotFound);
        place.write("nonsense").expect("written");
        assert_eq!(place.read(&blocks()).expect_err("damaged").kind(), io::ErrorKind::InvalidData);
        place.write(&format!("{HEAD}\n")).expect("replaced");
        assert!(place.read(&blocks()).is_ok());
    }
}
