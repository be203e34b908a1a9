//! The record of a delta that names its base.
//!
//! ```text
//! kind 4  0 root of the base | 16 u64 where the base begins in its file | 24 u32 length of the path | 28 path
//! ```
//!
//! The path is relative to the folder of the delta. It is a hint: the root decides.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use multifd::ram::Digest;

use super::record::{Body, fields, place};
use crate::{
    error::{Error, Malformed, Usage},
    format::Put,
};

/// Bytes before the path.
const START: usize = 28;
/// The greatest length of the path: that of the system.
const MOST_PATH: usize = 4096;

/// The name of a base in its delta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseName {
    /// The digest of the base and of all its bases ([`ChainFile::root`](crate::mapped_ram::ChainFile::root)).
    pub root: Digest,
    /// The path, relative to the folder of the delta. It comes from the file and is only a hint.
    pub path: PathBuf,
    /// Where the base begins in its file, in bytes.
    pub offset: u64,
}

impl BaseName {
    pub(super) fn encode(&self) -> Result<Vec<u8>, Usage> {
        let path = self.path.as_os_str().as_bytes();
        let length = u32::try_from(path.len()).ok().filter(|_| is_path(path));
        let Some(length) = length else {
            let why = format!("{:?}: expected a path of 1 to {MOST_PATH} bytes without NUL", self.path);
            return Err(Usage::Value { what: "path of the base", why });
        };
        let mut out = Vec::with_capacity(START + path.len());
        out.put(&self.root.to_bytes());
        out.put_u64(self.offset);
        out.put_u32(length);
        out.put(path);
        Ok(out)
    }

    pub(super) fn read(record: &Body<'_>) -> Result<Self, Error> {
        let bytes = record.bytes(START + MOST_PATH, "name of the base")?;
        let refused = || {
            let (field, expected) = ("length of the path of the base", "all bytes that follow, without NUL");
            Malformed::value(field, expected, bytes.len() as u64).at(place(record.start))
        };
        let (root, rest) = bytes.split_first_chunk().ok_or_else(refused)?;
        let [offset] = fields(rest);
        let (length, path) = rest.get(8..).and_then(<[u8]>::split_first_chunk).ok_or_else(refused)?;
        if u32::from_be_bytes(*length) as usize != path.len() || !is_path(path) {
            return Err(refused());
        }
        let path = Path::new(OsStr::from_bytes(path)).to_owned();
        Ok(Self { root: Digest::from_bytes(*root), path, offset })
    }
}

fn is_path(path: &[u8]) -> bool {
    (1..=MOST_PATH).contains(&path.len()) && !path.contains(&0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    /// A record with this body.
    fn read(body: &[u8]) -> Result<BaseName, Error> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(body, 7).unwrap();
        BaseName::read(&Body { file: &file, start: 7, length: body.len() as u64, digest: Digest::of(body) })
    }

    fn name(path: &[u8]) -> BaseName {
        let path = Path::new(OsStr::from_bytes(path)).to_owned();
        BaseName { root: Digest::of(b"root"), path, offset: 0x1234 }
    }

    #[test]
    fn record_is_as_drawn() {
        let bytes = name(b"../a").encode().unwrap();
        let expected =
            [&Digest::of(b"root").to_bytes()[..], &[0, 0, 0, 0, 0, 0, 0x12, 0x34], &[0, 0, 0, 4], b"../a"];
        assert_eq!(bytes, expected.concat());
        assert_eq!(read(&bytes).unwrap(), name(b"../a"));
    }

    #[test]
    fn path_that_is_no_path_is_neither_written_nor_read() {
        let longest = vec![b'x'; MOST_PATH];
        assert_eq!(read(&name(&longest).encode().unwrap()).unwrap().path.as_os_str().len(), MOST_PATH);
        for path in [&b""[..], b"a\0b", &[&longest[..], b"x"].concat()] {
            assert!(name(path).encode().is_err());
            let mut bytes = name(b"x").encode().unwrap();
            bytes.truncate(START - 4);
            bytes.extend(u32::try_from(path.len()).unwrap().to_be_bytes());
            bytes.extend(path);
            assert!(read(&bytes).is_err(), "{} bytes", path.len());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(found) = read(&bytes) {
                prop_assert_eq!(found.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn name_reads_back_as_written(path in "[^\0]{1,99}", root: [u8; 16], offset: u64) {
            let name = BaseName { root: Digest::from_bytes(root), path: path.into(), offset };
            prop_assert_eq!(read(&name.encode().unwrap()).unwrap(), name);
        }
    }
}
