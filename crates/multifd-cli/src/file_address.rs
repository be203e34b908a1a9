//! The address of a file with a machine on the command line: a path, or in QEMU's form `file:PATH[,offset=N]`; for a
//! snapshot in a disk image, `file:PATH,snapshot=NAME`.
//!
//! A path that is not valid for a file is refused here, as wrong usage. The file system is queried when the file is
//! opened for reading, or by [`NewFile`](crate::new_file::NewFile) for writing.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use multifd::{
    error::{UntrustedText, is_executed},
    ram,
};
use parse_size::Config;
use qemu_stream::mapped_ram;

use crate::output::{outcome::While, outlet::shown};

/// The place of a machine: a file, and the position in it at which its stream begins, or the name of a snapshot in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileAddress {
    path: PathBuf,
    offset: u64,
    snapshot: Option<String>,
}

/// Whether a file is compared with the digests in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Digests {
    Compare,
    /// It is read although it may be damaged.
    Ignore,
}

impl Digests {
    /// `--no-verify`.
    pub(crate) fn unless(no_verify: bool) -> Self {
        if no_verify { Self::Ignore } else { Self::Compare }
    }
}

impl From<Digests> for mapped_ram::Digests {
    fn from(digests: Digests) -> Self {
        match digests {
            Digests::Compare => Self::Compare,
            Digests::Ignore => Self::Ignore,
        }
    }
}

impl FileAddress {
    /// Parses `PATH`, `file:PATH[,offset=N]` or `file:PATH,snapshot=NAME`. A path that begins with `file:`, or like an address, is written `./file:…`.
    pub(crate) fn parse(text: OsString) -> Result<Self, String> {
        if let Some(kind) = kind_of_address(&text.to_string_lossy()) {
            return Err(format!(
                "expected the path of a file, found an address: did you swap the file and the address? A file of this name \
                 is written ./{kind}:..."
            ));
        }
        let Some(rest) = text.as_bytes().strip_prefix(b"file:") else {
            return Ok(Self::of(file_path(text)?));
        };
        let (rest, snapshot) = match rest.windows(SNAPSHOT.len()).position(|window| window == SNAPSHOT) {
            Some(at) => (&rest[..at], Some(name(&rest[at + SNAPSHOT.len()..])?)),
            None => (rest, None),
        };
        let mut windows = rest.windows(OFFSET.len());
        let (path, offset) = match windows.position(|window| window == OFFSET) {
            Some(at) => (&rest[..at], position(&rest[at + OFFSET.len()..])?),
            None => (rest, 0),
        };
        if path.is_empty() {
            return Err("expected file:PATH or file:PATH,offset=N, found no path".into());
        }
        if let Some(option) = option_behind(path) {
            return Err(format!(
                "expected file:PATH or file:PATH,offset=N, found the option {option:?}; if it belongs to the path, leave out \
                 file:"
            ));
        }
        Ok(Self { path: file_path(OsString::from_vec(path.to_owned()))?, offset, snapshot })
    }

    /// The same for a file that is written, or has no snapshots.
    pub(crate) fn parse_plain(text: OsString) -> Result<Self, String> {
        let parsed = Self::parse(text)?;
        match parsed.snapshot {
            None => Ok(parsed),
            Some(_) => Err("snapshot=NAME names a machine in a disk image, which is only read".into()),
        }
    }

    /// A whole file at a path that this program has made.
    pub(crate) fn of(path: PathBuf) -> Self {
        Self { path, offset: 0, snapshot: None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The position at which the stream begins, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The name or the id of the snapshot that is meant.
    pub(crate) fn snapshot(&self) -> Option<&str> {
        self.snapshot.as_deref()
    }

    /// How it is typed with this path: a name that cannot be shown as it is stays a placeholder.
    pub(crate) fn typed(&self, path: &str) -> String {
        match (&self.snapshot, self.offset) {
            (None, 0) => path.to_owned(),
            (None, offset) => format!("file:{path},offset={offset:#x}"),
            (Some(name), _) => {
                let name = if name.contains(is_executed) { "NAME" } else { name };
                format!("file:{path},snapshot={name}")
            }
        }
    }

    /// The error of a machine that cannot be read.
    pub(crate) fn unreadable(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> While {
        While::new(format!("cannot read {self}"), error)
    }
}

impl fmt::Display for FileAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.path))?;
        if self.offset > 0 {
            write!(f, " at offset {:#x}", self.offset)?;
        }
        if let Some(name) = &self.snapshot {
            write!(f, ", snapshot {:?}", UntrustedText::from_bytes(name.as_bytes()))?;
        }
        Ok(())
    }
}

/// Parses a path whose last part can be the name of a file.
///
/// # Errors
/// If it is empty, or can only be a folder's: `x/`, `.`, `..`.
pub(crate) fn file_path(text: OsString) -> Result<PathBuf, String> {
    let name = text.as_bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let why = match name {
        _ if text.is_empty() => "found an empty path",
        b"" => "but a path that ends in / names a folder",
        b"." | b".." => "but a path that ends in . or .. names a folder",
        _ => return Ok(text.into()),
    };
    Err(format!("expected the path of a file, {why}"))
}

/// Opens a regular file for reading. A FIFO or a device is not opened, because that would wait for a writer or consume
/// its data.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    ram::open_regular(path, |found| {
        if found.is_dir() { ": name a file in it" } else { ": copy its data into a file first" }
    })
}

/// The kind of address that a text is, if it is one.
pub(crate) fn kind_of_address(text: &str) -> Option<&'static str> {
    let (kind, _) = text.split_once(':')?;
    ["tcp", "unix", "vsock", "exec", "fd"].into_iter().find(|known| *known == kind)
}

/// What looks like an option at the end of a path: `,ofset=1`, `,offset`.
fn option_behind(path: &[u8]) -> Option<UntrustedText> {
    let at = path.iter().rposition(|byte| *byte == b',')?;
    let option = path.get(at + 1..)?;
    let name = option.split(|byte| *byte == b'=').next().unwrap_or_default();
    let is_name = !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphabetic() || *byte == b'-');
    let looks = is_name && (option.contains(&b'=') || name == b"offset" || name == b"snapshot");
    looks.then(|| UntrustedText::from_bytes(option))
}

/// The name of a snapshot.
fn name(text: &[u8]) -> Result<String, String> {
    match std::str::from_utf8(text) {
        Ok(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(format!("expected the name of a snapshot, found {:?}", UntrustedText::from_bytes(text))),
    }
}

const OFFSET: &[u8] = b",offset=";
const SNAPSHOT: &[u8] = b",snapshot=";
/// The greatest position in a file.
const LAST: u64 = i64::MAX as u64;

/// Parses bytes: decimal with QEMU's suffixes (4K is 4096), or hexadecimal without a suffix.
fn position(text: &[u8]) -> Result<u64, String> {
    let shown = UntrustedText::from_bytes(text);
    let hexadecimal = shown.as_raw().strip_prefix("0x").or_else(|| shown.as_raw().strip_prefix("0X"));
    let parsed = match hexadecimal {
        // A sign is not a digit, although `from_str_radix` accepts it.
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        Some(_) => None,
        None => Config::new().with_binary().parse_size(text).ok(),
    };
    match parsed {
        Some(offset @ 0..=LAST) => Ok(offset),
        Some(_) => Err(format!("expected an offset of at most {LAST:#x} bytes, found {shown:?}")),
        None => Err(format!("expected an offset in bytes like 0x1000, 4096 or 4K, found {shown:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(String, u64), String> {
        let parsed = FileAddress::parse(text.into())?;
        Ok((parsed.path.to_str().expect("UTF-8").to_owned(), parsed.offset))
    }

    #[test]
    fn paths_and_qemus_form_are_read() {
        for (text, path, offset) in [
            ("vm.ram", "vm.ram", 0),
            ("vm,offset=7", "vm,offset=7", 0),
            ("./file:vm", "./file:vm", 0),
            ("file:vm.ram", "vm.ram", 0),
            ("file:/a,b.ram", "/a,b.ram", 0),
            ("/a,b.ram,foo=bar", "/a,b.ram,foo=bar", 0),
            ("file:/a=b,c.ram", "/a=b,c.ram", 0),
            ("file:/a,1=b", "/a,1=b", 0),
            ("./tcp:host:1", "./tcp:host:1", 0),
            ("tcp", "tcp", 0),
            ("tape:1", "tape:1", 0),
            ("file:/a,b,offset=0x1000", "/a,b", 0x1000),
            ("file:vm,offset=4096", "vm", 4096),
            ("file:vm,offset=4K", "vm", 4096),
            ("file:vm,offset=4k", "vm", 4096),
            ("file:vm,offset=1.5M", "vm", 3 << 19),
            ("file:vm,offset=010", "vm", 10),
        ] {
            assert_eq!(parse(text), Ok((path.to_owned(), offset)), "{text}");
        }
    }

    #[test]
    fn name_of_a_snapshot_is_everything_after_its_option_and_only_read() {
        for (text, path, name) in [
            ("file:a.qcow2,snapshot=one", "a.qcow2", "one"),
            ("file:/a,b,snapshot=one, two,offset=3", "/a,b", "one, two,offset=3"),
            ("file:a,snapshot=x,snapshot=y", "a", "x,snapshot=y"),
        ] {
            let parsed = FileAddress::parse(text.into()).expect(text);
            assert_eq!((parsed.path.to_str(), parsed.snapshot()), (Some(path), Some(name)), "{text}");
            assert_eq!(parsed.typed(path), text);
            assert!(FileAddress::parse_plain(text.into()).expect_err(text).contains("only read"));
        }
        for text in ["file:a,snapshot=", "file:a,snapshot", "file:,snapshot=one"] {
            FileAddress::parse(text.into()).expect_err(text);
        }
        assert_eq!(FileAddress::parse("a,snapshot=one".into()).expect("a path").snapshot(), None);
    }

    /// Regression: the option became a part of the path, and the machine was written to a file of that name.
    #[test]
    fn option_that_is_misspelt_is_refused_with_the_one_that_is() {
        for (text, option) in [
            ("file:vm,ofset=1", "ofset=1"),
            ("file:vm,Offset=1", "Offset=1"),
            ("file:vm,offset", "offset"),
            ("file:/a,b.ram,foo=bar", "foo=bar"),
            ("file:vm,foo=1,offset=2", "foo=1"),
            ("file:vm,direct-io=on", "direct-io=on"),
        ] {
            let refused = parse(text).expect_err(text);
            assert!(refused.contains(&format!("offset=N, found the option {option:?}")), "{refused}");
        }
    }

    #[test]
    fn address_in_place_of_a_file_is_refused() {
        for text in ["tcp:127.0.0.1:1", "unix:/run/x", "fd:3", "exec:cat", "vsock:1:2"] {
            let refused = parse(text).expect_err(text);
            assert!(refused.contains("did you swap the file and the address?"), "{refused}");
        }
    }

    #[test]
    fn what_is_no_offset_is_refused() {
        for offset in ["", "-1", "0x", "0x1G", "0x+1", "16E", "4096,foo=1", "1,offset=2", "lots"] {
            let refused = parse(&format!("file:vm,offset={offset}")).expect_err(offset);
            assert!(refused.contains(&format!("found {offset:?}")), "{refused}");
        }
        assert!(parse("file:").is_err() && parse("file:,offset=1").is_err());
    }

    #[test]
    fn offset_that_no_file_has_is_refused_with_the_last_one() {
        assert_eq!(parse("file:vm,offset=0x7fffffffffffffff"), Ok(("vm".into(), LAST)));
        for offset in ["0x8000000000000000", "8E", "18446744073709551615"] {
            let refused = parse(&format!("file:vm,offset={offset}")).expect_err(offset);
            assert!(refused.contains("at most 0x7fffffffffffffff bytes"), "{refused}");
        }
    }

    #[test]
    fn path_that_only_a_folder_can_have_is_refused() {
        for path in ["", "x/", "x//", "/", ".", "..", "x/.", "x/..", "file:x/", "file:..,offset=1"] {
            let refused = parse(path).expect_err(path);
            assert!(refused.starts_with("expected the path of a file"), "{refused}");
        }
        for path in ["...", "x/.y", "/x", "x/..y", " "] {
            assert_eq!(parse(path), Ok((path.to_owned(), 0)), "{path}");
        }
    }

    #[test]
    fn path_that_is_no_text_is_kept_to_the_byte() {
        let text = OsString::from_vec(b"file:\xff,offset=1".to_vec());
        let parsed = FileAddress::parse(text).expect("a path");
        assert_eq!(parsed.path.as_os_str().as_bytes(), b"\xff");
    }
}
