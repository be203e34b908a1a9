//! The head of a qcow2 image and the list of its snapshots.
//!
//! ```text
//! 0 "QFI\xfb" | 4 u32 version | 20 u32 bits of a cluster | 24 u64 size of the disk | 32 u32 encryption | 60 u32 snapshots |
//! 64 u64 where their list is | 72 u64 incompatible features (version 3)
//! snapshot: 0 u64 table 1 | 8 u32 entries | 12 u16 length of the id | 14 u16 of the name | 16 u32 seconds | 20 u32 nanoseconds |
//!           24 u64 clock | 32 u32 bytes of the state | 36 u32 length of more: u64 bytes of the state, u64 size of the disk, … |
//!           more, id, name, padding to 8 bytes
//! ```
//!
//! An image is untrusted. Nothing is allocated but for one snapshot after the other, and the list is read only up to its bounds. What
//! cannot be read is refused here, so that a [`Snapshot`] has a state that can be.

use multifd::error::UntrustedText;

use crate::{
    error::{Error, Malformed, Place, StreamKind, Unsupported},
    recording::Bytes,
};

/// A qcow2 image that was opened.
#[derive(Debug)]
pub struct DiskImage<B> {
    pub(super) file: B,
    pub(super) geometry: Geometry,
    snapshots: Vec<Snapshot>,
}

/// A snapshot in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, which QEMU has chosen.
    pub id: UntrustedText,
    /// Its name.
    pub name: UntrustedText,
    /// The length of the machine's state in bytes; 0 if the machine is in the image of another disk.
    pub state: u64,
    pub(super) table: Table,
}

/// What the places of clusters depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of a cluster.
    pub(super) cluster: u64,
    /// Whether entries of table 2 have a second word, with a bit for each of 32 parts.
    pub(super) is_extended: bool,
}

/// The first table of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// Where it is in the file.
    pub(super) at: u64,
    /// The number of its entries.
    pub(super) entries: u32,
    /// The entry with which the state begins, after those of the disk.
    pub(super) first: u64,
}

impl Geometry {
    /// Bytes of an entry of table 2.
    pub(super) fn entry(self) -> u64 {
        if self.is_extended { 16 } else { 8 }
    }

    /// Bytes that one entry of table 1 covers.
    pub(super) fn span(self) -> u64 {
        self.cluster / self.entry() * self.cluster
    }
}

impl<B: Bytes> DiskImage<B> {
    /// Reads the head and the list of snapshots.
    ///
    /// # Errors
    /// If it is no qcow2 image, malformed, encrypted, uses a feature that is not known, or cannot be read.
    pub fn open(file: B) -> Result<Self, Error> {
        let mut head = [0; HEAD];
        let found = fill(&file, &mut head, 0)?;
        let field = |at, length| number(&head, at, length);
        if found < HEAD_OF_VERSION_2 || !head.starts_with(MAGIC) {
            return Err(Malformed::value("magic of a disk image", "0x514649fb", field(0, 4)).at(place(0)));
        }
        let version = field(4, 4);
        if !(2..=3).contains(&version) {
            return Err(Malformed::value("version of a qcow2 image", "2 or 3", version).at(place(4)));
        }
        let bits = field(20, 4);
        if !CLUSTER_BITS.contains(&bits) {
            return Err(Malformed::value("bits of a cluster", "9 to 21", bits).at(place(20)));
        }
        if field(32, 4) != 0 {
            return Err(Unsupported::DiskImage("an encrypted qcow2 image").at(place(32)));
        }
        let features = if version == 3 && found == HEAD { field(72, 8) } else { 0 };
        for (bit, what) in REFUSED_FEATURES {
            if features & bit != 0 {
                return Err(Unsupported::DiskImage(what).at(place(72)));
            }
        }
        if features & !KNOWN_FEATURES != 0 {
            let what = "a qcow2 image with an incompatible feature that is not known";
            return Err(Unsupported::DiskImage(what).at(place(72)));
        }
        let geometry = Geometry { cluster: 1 << bits, is_extended: features & EXTENDED != 0 };
        let count = field(60, 4);
        if count > MOST_SNAPSHOTS {
            return Err(Malformed::too_long("snapshots of a disk image", MOST_SNAPSHOTS, count).at(place(60)));
        }
        let (size, mut at) = (field(24, 8), field(64, 8));
        let end = at.saturating_add(MOST_LIST);
        let mut snapshots = Vec::new();
        for _ in 0..count {
            let (snapshot, length) = snapshot(&file, at, size, geometry)?;
            snapshots.push(snapshot);
            at = at.saturating_add(length);
            if at > end {
                let length = MOST_LIST.saturating_add(at - end);
                return Err(Malformed::too_long("list of snapshots", MOST_LIST, length).at(place(64)));
            }
        }
        Ok(Self { file, geometry, snapshots })
    }

    /// The snapshots, in the order of the image.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }
}

/// Reads the snapshot at `at`; returns its length in the list, too.
fn snapshot<B: Bytes>(file: &B, at: u64, size: u64, geometry: Geometry) -> Result<(Snapshot, u64), Error> {
    let mut head = [0; SNAPSHOT];
    whole(file, &mut head, at, "a snapshot of a disk image")?;
    let field = |from, length| number(&head, from, length);
    let (more, id, name) = (field(36, 4), field(12, 2), field(14, 2));
    if more > MOST_MORE {
        return Err(Malformed::too_long("fields of a snapshot", MOST_MORE, more).at(place(at + 36)));
    }
    let length = usize::try_from(more + id + name).unwrap_or(usize::MAX);
    let mut rest = vec![0; length];
    let from = at.saturating_add(SNAPSHOT as u64);
    whole(file, &mut rest, from, "the name of a snapshot")?;
    let text = |from: u64, length: u64| {
        let range = usize::try_from(from).ok()..usize::try_from(from + length).ok();
        let bytes = range.start.zip(range.end).and_then(|(from, to)| rest.get(from..to));
        UntrustedText::from_bytes(bytes.unwrap_or_default())
    };
    let state = if more >= 8 { number(&rest, 0, 8) } else { field(32, 4) };
    let disk = if more >= 16 { number(&rest, 8, 8) } else { size };
    let table = Table {
        at: field(0, 8),
        entries: u32::try_from(field(8, 4)).unwrap_or(u32::MAX),
        first: disk.div_ceil(geometry.span()),
    };
    let snapshot = Snapshot { id: text(more, id), name: text(more + id, name), state, table };
    Ok((snapshot, (SNAPSHOT as u64 + length as u64).next_multiple_of(8)))
}

/// A big-endian number of at most 8 bytes; 0 if the bytes are not there.
pub(super) fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let field = bytes.get(at..at + length).unwrap_or_default();
    field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Fills `into`; fails if the image ends before.
pub(super) fn whole<B: Bytes>(
    file: &B,
    into: &mut [u8],
    at: u64,
    expected: &'static str,
) -> Result<(), Error> {
    if fill(file, into, at)? == into.len() {
        return Ok(());
    }
    Err(Error::Cut { at: place(at), expected })
}

/// Fills `into` as far as the image has bytes.
fn fill<B: Bytes>(file: &B, into: &mut [u8], at: u64) -> Result<usize, Error> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let from = at.saturating_add(done as u64);
        let count = file.read_at(rest, from).map_err(|source| Error::Io {
            at: place(from),
            doing: "read the disk image",
            source,
        })?;
        if count == 0 {
            break;
        }
        done += count;
    }
    Ok(done)
}

/// A place in the image.
pub(super) fn place(offset: u64) -> Place {
    Place { stream: StreamKind::DiskImage, offset }
}

const MAGIC: &[u8] = b"QFI\xfb";
/// Bytes of the head that are read: all of it in version 2, and the features of version 3.
const HEAD: usize = 80;
const HEAD_OF_VERSION_2: usize = 72;
/// Bytes of a snapshot before its fields of variable length.
const SNAPSHOT: usize = 40;
const CLUSTER_BITS: std::ops::RangeInclusive<u64> = 9..=21;
const EXTENDED: u64 = 1 << 4;
/// Not closed cleanly, another compression, extended entries.
const KNOWN_FEATURES: u64 = 1 | 1 << 3 | EXTENDED;
const REFUSED_FEATURES: [(u64, &str); 2] = [
    (1 << 1, "a qcow2 image that is marked as corrupt (qemu-img check)"),
    (1 << 2, "a qcow2 image whose data is in another file"),
];
/// Snapshots of an image: as many as QEMU creates.
pub(super) const MOST_SNAPSHOTS: u64 = 65_536;
/// Bytes of the fields of a snapshot besides its names. QEMU writes 24.
pub(super) const MOST_MORE: u64 = 1024;
/// Bytes of the list: 1 KiB for each snapshot.
pub(super) const MOST_LIST: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// Bytes of a cluster of the image below, and of its disk: one entry of table 1.
    const CLUSTER: usize = 512;
    const DISK: u64 = 64 * 512;

    fn put(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
        image.resize(image.len().max(at + bytes.len()), 0);
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// An image as QEMU writes it: head, list with a snapshot `one` without a machine and `two` with one of 1,100 bytes, table 1,
    /// table 2, and clusters in another order; the second one of the three is not there.
    fn image() -> Vec<u8> {
        let mut image = Vec::new();
        put(&mut image, 0, b"QFI\xfb\0\0\0\x03");
        put(&mut image, 20, &9_u32.to_be_bytes());
        put(&mut image, 24, &DISK.to_be_bytes());
        put(&mut image, 60, &2_u32.to_be_bytes());
        put(&mut image, 64, &1024_u64.to_be_bytes());
        put(&mut image, 72, &[0; 32]);
        let mut at = 1024;
        for (id, name, state, entries) in [(b"1", b"one", 0_u64, 1_u32), (b"2", b"two", 1100, 2)] {
            put(&mut image, at, &1536_u64.to_be_bytes());
            put(&mut image, at + 8, &entries.to_be_bytes());
            put(&mut image, at + 12, &[0, 1, 0, 3]);
            put(&mut image, at + 32, &7_u32.to_be_bytes());
            put(&mut image, at + 36, &16_u32.to_be_bytes());
            put(&mut image, at + 40, &state.to_be_bytes());
            put(&mut image, at + 48, &DISK.to_be_bytes());
            put(&mut image, at + 56, id);
            put(&mut image, at + 57, name);
            at += 64;
        }
        put(&mut image, 1536 + 8, &(1 << 63 | 2048_u64).to_be_bytes());
        put(&mut image, 2048, &(1 << 63 | 3072_u64).to_be_bytes());
        put(&mut image, 2048 + 16, &(1 << 63 | 2560_u64).to_be_bytes());
        put(&mut image, 2560, &[3; CLUSTER]);
        put(&mut image, 3072, &[1; CLUSTER]);
        image
    }

    fn state(image: &[u8], number: usize) -> Result<Vec<u8>, String> {
        let open = DiskImage::open(image).map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        let mut state = open.state(&open.snapshots()[number]);
        match state.read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn state_is_read_from_behind_the_disk_and_holes_are_zero() {
        let image = image();
        let open = DiskImage::open(&*image).expect("an image");
        let all: Vec<_> = open.snapshots().iter().map(|found| (found.name.as_raw(), found.state)).collect();
        assert_eq!(all, [("one", 0), ("two", 1100)]);
        let expected = [[1; CLUSTER].as_slice(), &[0; CLUSTER], &[3; 1100 - 1024]].concat();
        assert_eq!(state(&image, 1), Ok(expected));
        assert_eq!(state(&image, 0), Ok(Vec::new()));
    }

    #[test]
    fn parts_of_a_cluster_with_extended_entries_are_zero_if_they_are_not_there() {
        let mut image = image();
        put(&mut image, 72, &EXTENDED.to_be_bytes());
        // One entry of table 1 now covers half as much, so the disk has two.
        put(&mut image, 1024 + 64 + 8, &3_u32.to_be_bytes());
        put(&mut image, 1536 + 16, &(1 << 63 | 2048_u64).to_be_bytes());
        put(&mut image, 2048, &[0; CLUSTER]);
        put(&mut image, 2048, &3072_u64.to_be_bytes());
        put(&mut image, 2048 + 8, &0xf0_u64.to_be_bytes());
        let found = state(&image, 1).expect("a state");
        let part = CLUSTER / 32;
        assert!(found[..4 * part].iter().all(|byte| *byte == 0));
        assert!(found[4 * part..8 * part].iter().all(|byte| *byte == 1));
        assert!(found[8 * part..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let refused = |at: usize, bytes: &[u8]| {
            let mut image = image();
            put(&mut image, at, bytes);
            state(&image, 1).expect_err("refused")
        };
        for (at, bytes, why) in [
            (0, &b"QFJ"[..], "magic of a disk image"),
            (4, &[0, 0, 0, 4], "version of a qcow2 image"),
            (20, &[0, 0, 0, 8], "bits of a cluster"),
            (20, &[0, 0, 0, 22], "bits of a cluster"),
            (32, &[0, 0, 0, 2], "encrypted"),
            (79, &[2], "corrupt"),
            (79, &[4], "another file"),
            (79, &[0x20], "feature that is not known"),
            (2048, &[0x40], "compressed cluster"),
            (1024 + 64, &[0, 0, 0, 0, 0, 1], "a table of a snapshot"),
            (2048 + 3, &[1], "the state of a machine"),
            (64, &[1], "a snapshot of a disk image"),
        ] {
            let text = refused(at, bytes);
            assert!(text.contains(why), "{why}: {text}");
        }
    }

    #[test]
    fn each_bound_is_kept() {
        let with = |at: usize, number: u64, length: usize| {
            let mut image = image();
            put(&mut image, at, &number.to_be_bytes()[8 - length..]);
            state(&image, 1)
        };
        let text = with(60, MOST_SNAPSHOTS + 1, 4).expect_err("too many");
        assert!(
            text.contains("snapshots of a disk image: expected at most 0x10000, found 0x10001"),
            "{text}"
        );
        let text = with(1024 + 36, MOST_MORE + 1, 4).expect_err("too long");
        assert!(text.contains("fields of a snapshot"), "{text}");
        // The state does not end where its table does.
        let text = with(1024 + 64 + 40, 64 * 512 + 1, 8).expect_err("too long");
        assert!(text.contains("state of a machine, in entries: expected at most 0x2, found 0x2"), "{text}");
        assert_eq!(with(1024 + 64 + 40, 64 * 512, 8).expect("the whole table").len(), 64 * 512);
    }

    /// An image whose list never ends: every snapshot has the longest names.
    #[derive(Debug)]
    struct Endless;

    impl Bytes for Endless {
        fn read_at(&self, into: &mut [u8], offset: u64) -> std::io::Result<usize> {
            let head = image();
            let length = (SNAPSHOT as u64 + 2 * 0xffff).next_multiple_of(8);
            for (at, byte) in (offset..).zip(into.iter_mut()) {
                let in_head = usize::try_from(at).ok().filter(|at| *at < HEAD).and_then(|at| head.get(at));
                *byte = match (at.wrapping_sub(1024) % length, in_head) {
                    (_, Some(byte)) => *byte,
                    (12..16, None) => 0xff,
                    _ => 0,
                };
                // 65,536 of them.
                if (60..64).contains(&at) {
                    *byte = u8::from(at == 61);
                }
            }
            Ok(into.len())
        }

        fn length(&self) -> std::io::Result<u64> {
            Ok(u64::MAX)
        }
    }

    #[test]
    fn list_that_is_too_long_is_refused() {
        let text = DiskImage::open(Endless).expect_err("too long").to_string();
        assert!(text.contains("list of snapshots: expected at most 0x4000000"), "{text}");
    }

    #[test]
    fn image_that_is_cut_anywhere_is_refused_or_read_as_far_as_it_is_there() {
        let whole = image();
        for length in 0..whole.len() {
            let Ok(open) = DiskImage::open(&whole[..length]) else { continue };
            for snapshot in open.snapshots() {
                let _ = open.state(snapshot).read_to_end(&mut Vec::new());
            }
        }
    }
}
