//! The areas of this process's address space, as the system lists them: what is mapped where, and with which rights.
//!
//! ```text
//! /proc/self/smaps ─ every area, with its flags ─▶ what decides whether an untouched page is zero
//! /proc/self/maps  ─ every area ─────────────────▶ which pages this process may access
//! ```
//!
//! The first list costs the system a walk of the page table up to the last wanted address, about 40 ms per GiB of touched
//! 4 KiB pages; it is read once per migration. The second costs less than a millisecond. Both may be missing, in a
//! sandbox without `/proc`: then nothing is known, and pages are read.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    ops::Range,
};

/// An area: adjacent pages that were mapped in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) range: Range<u64>,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) shared: bool,
    /// The offset of its first byte in the file.
    pub(crate) offset: u64,
    /// Device and inode of the file; inode 0 if it is of no file.
    pub(crate) file: (u32, u32, u64),
    /// Whether something else than zeros may appear in a page when it is first touched, although no file has it: a
    /// `userfaultfd` fills missing pages, or a device has mapped its memory there. Only known from [`Areas::with_flags`].
    pub(crate) filled: bool,
    /// The size of its pages in bytes. Only known from [`Areas::with_flags`], otherwise 0.
    pub(crate) page_size: u64,
    /// Whether somebody has said that huge pages are wanted (`MADV_HUGEPAGE`), or not (`MADV_NOHUGEPAGE`). Only known from
    /// [`Areas::with_flags`].
    #[cfg_attr(not(feature = "fault"), allow(dead_code, reason = "only memory that is filled later asks"))]
    pub(crate) huge: Option<bool>,
}

/// The areas that contain wanted addresses, in the order of addresses.
#[derive(Debug)]
pub(crate) struct Areas(Vec<Area>);

impl Areas {
    /// Reads the areas with addresses in `wanted`, with their flags.
    ///
    /// # Errors
    /// If the system does not list them.
    pub(crate) fn with_flags(wanted: &[Range<u64>]) -> io::Result<Self> {
        Self::parse(BufReader::new(File::open("/proc/self/smaps")?), wanted)
    }

    /// Reads the areas with addresses in `wanted`, without their flags.
    ///
    /// # Errors
    /// If the system does not list them.
    pub(crate) fn without_flags(wanted: &[Range<u64>]) -> io::Result<Self> {
        Self::parse(BufReader::new(File::open("/proc/self/maps")?), wanted)
    }

    fn parse(mut list: impl BufRead, wanted: &[Range<u64>]) -> io::Result<Self> {
        let last = wanted.iter().map(|range| range.end).max().unwrap_or(0);
        let is_wanted = |area: &Area| {
            wanted.iter().any(|range| range.start < area.range.end && area.range.start < range.end)
        };
        let (mut areas, mut line): (Vec<Area>, _) = (Vec::new(), Vec::new());
        // Whether the last area of the list is the one that the flags are of.
        let mut is_kept = false;
        loop {
            line.clear();
            if list.read_until(b'\n', &mut line)? == 0 {
                return Ok(Self(areas));
            }
            let text = String::from_utf8_lossy(&line);
            if let Some(size) = text.strip_prefix("KernelPageSize:") {
                if let Some(area) = areas.last_mut().filter(|_| is_kept) {
                    let kib = size.trim().strip_suffix("kB").and_then(|kib| kib.trim().parse().ok());
                    area.page_size = kib.unwrap_or(0_u64) << 10;
                }
            } else if let Some(flags) = text.strip_prefix("VmFlags:") {
                if let Some(area) = areas.last_mut().filter(|_| is_kept) {
                    area.filled = flags.split_ascii_whitespace().any(|flag| FILLED.contains(&flag));
                    let has = |wanted| flags.split_ascii_whitespace().any(|flag| flag == wanted);
                    area.huge = if has("hg") { Some(true) } else { has("nh").then_some(false) };
                }
            } else if let Some(area) = area(&text) {
                if area.range.start >= last {
                    return Ok(Self(areas));
                }
                is_kept = is_wanted(&area);
                if is_kept {
                    areas.push(area);
                }
            }
        }
    }

    /// The parts of `range`, each with its area; `None` where nothing is mapped.
    pub(crate) fn parts(&self, range: &Range<u64>) -> Vec<(Range<u64>, Option<&Area>)> {
        let (mut at, mut parts) = (range.start, Vec::new());
        for area in self.0.iter().filter(|area| area.range.end > range.start && area.range.start < range.end)
        {
            let (start, end) = (area.range.start.max(range.start), area.range.end.min(range.end));
            if at < start {
                parts.push((at..start, None));
            }
            parts.push((start..end, Some(area)));
            at = end;
        }
        if at < range.end {
            parts.push((at..range.end, None));
        }
        parts
    }
}

impl Area {
    /// Whether it is private memory of no file, which is zero where it was never touched.
    pub(crate) fn is_private_memory(&self) -> bool {
        !self.shared && self.file.2 == 0
    }
}

/// The flags of areas that something else fills: missing pages by a `userfaultfd`, memory of a device.
const FILLED: [&str; 4] = ["um", "io", "pf", "mm"];

/// The area of a line such as `7f00-7f80 rw-p 00001000 fe:00 1234  /a/file`; `None` if it is another kind of line.
fn area(line: &str) -> Option<Area> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = hex(start)?..hex(end)?;
    let rights = fields.next()?.as_bytes();
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = |text: &str| u32::from_str_radix(text, 16).ok();
    let inode = fields.next()?.parse().ok()?;
    let has = |at: usize, right: u8| rights.get(at) == Some(&right);
    Some(Area {
        range,
        readable: has(0, b'r'),
        writable: has(1, b'w'),
        shared: has(3, b's'),
        offset,
        file: (device(major)?, device(minor)?, inode),
        filled: false,
        huge: None,
        page_size: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
00001000-00003000 rw-p 00000000 00:00 0 
Size:                  8 kB
VmFlags: rd wr mr mw me ac sd 
00003000-00005000 ---p 00000000 00:00 0 
VmFlags: mr mw me ac sd 
00008000-00009000 rw-s 00002000 00:01 1027                               /memfd:a b-c (deleted)
VmFlags: rd wr sh mr mw me ms sd 
0000a000-0000b000 rw-p 00000000 00:00 0                                  [anon:um]
VmFlags: rd wr mr mw me um sd 
";

    #[test]
    fn areas_and_gaps_cover_a_range_in_order_with_rights_and_flags() {
        let areas = Areas::parse(LIST.as_bytes(), std::slice::from_ref(&(0x2000..0xc000))).expect("parsed");
        let parts: Vec<_> = areas
            .parts(&(0x2000..0xc000))
            .into_iter()
            .map(|(range, area)| (range, area.map(|area| (area.readable, area.shared, area.filled))))
            .collect();
        assert_eq!(
            parts,
            [
                (0x2000..0x3000, Some((true, false, false))),
                (0x3000..0x5000, Some((false, false, false))),
                (0x5000..0x8000, None),
                (0x8000..0x9000, Some((true, true, false))),
                (0x9000..0xa000, None),
                (0xa000..0xb000, Some((true, false, true))),
                (0xb000..0xc000, None),
            ]
        );
        let file = &areas.0[2];
        assert_eq!((file.offset, file.file), (0x2000, (0, 1, 1027)));
    }

    #[test]
    fn flags_of_an_area_that_is_not_wanted_are_not_taken_for_those_of_another() {
        let areas = Areas::parse(LIST.as_bytes(), &[0x1000..0x2000, 0xb000..0xb001]).expect("parsed");
        assert_eq!(areas.0.len(), 1);
        assert!(!areas.0[0].filled);
        assert!(Areas::parse(LIST.as_bytes(), &[]).expect("parsed").0.is_empty());
    }

    #[test]
    #[cfg_attr(miri, ignore = "the list is the kernel's")]
    fn both_lists_of_this_process_name_the_same_areas() {
        let mapping = crate::Mapping::anonymous(64 << 10).expect("memory");
        let start = mapping.slice(0, 0).expect("inside").as_ptr().addr() as u64;
        let range = start..start + (64 << 10);
        let wanted = std::slice::from_ref(&range);
        for areas in [Areas::with_flags(wanted), Areas::without_flags(wanted)] {
            let areas = areas.expect("listed");
            let parts = areas.parts(&range);
            assert_eq!(parts.len(), 1, "{parts:?}");
            let area = parts[0].1.expect("mapped");
            assert!(area.readable && area.writable && area.is_private_memory() && !area.filled);
        }
    }
}
