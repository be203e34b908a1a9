//! What to do with a file that is not a mapped-ram file: the command that works, with the user's own path.
//!
//! The libraries report what a file is. They know no path and no program, so the command is added here.

use std::{error::Error, fmt, io};

use multifd::error::is_executed;
use qemu_stream::{
    Error as StreamError,
    error::{BadBase, Malformed, Unsupported},
    format::{Compressor, LibvirtStorage, OtherFormat},
    mapped_ram::{self, BaseName, ChainFile, FoundFile, StoredMachine},
};

use crate::{
    file_address::{Digests, FileAddress, open_regular},
    output::outcome::While,
};

impl FileAddress {
    /// Opens the machine at this address for reading.
    pub(crate) fn open(&self, digests: Digests) -> Result<StoredMachine, While> {
        self.open_with(digests, |delta, base| FoundFile::beside(delta.path(), base))
    }

    /// The same; `find` opens the bases of a delta.
    pub(crate) fn open_with(
        &self,
        digests: Digests,
        find: impl FnMut(&ChainFile, &BaseName) -> io::Result<FoundFile>,
    ) -> Result<StoredMachine, While> {
        let found = self.found().map_err(|error| self.unreadable(error))?;
        let digests = match digests {
            Digests::Compare => mapped_ram::Digests::Compare,
            Digests::Ignore => mapped_ram::Digests::Ignore,
        };
        let opened = StoredMachine::open_with(found, digests, find);
        opened.map_err(|error| self.unreadable(of(error, self)))
    }

    /// The file, opened for reading.
    pub(crate) fn found(&self) -> io::Result<FoundFile> {
        let (path, offset) = (self.path().to_owned(), self.offset());
        Ok(FoundFile { file: open_regular(&path)?, offset, path })
    }
}

/// What reads a damaged file.
pub(crate) const READS_DAMAGED: &str = "use another copy of it; --no-verify reads it as it is";

/// An error of a file, and what to do about it.
#[derive(Debug)]
struct Remedied {
    error: StreamError,
    remedy: Option<String>,
}

/// What to do about a delta whose base cannot be used.
fn of_base(why: &BadBase) -> Option<String> {
    Some(match why {
        BadBase::Unreadable(_) => {
            "a base is looked for where it was, seen from the delta; multifd merge BASE DELTA NEW makes a \
                                   whole file of files that are elsewhere"
                .to_owned()
        }
        BadBase::TooMany(_) => "multifd merge makes one file of several".to_owned(),
        BadBase::Invalid { source, .. } => match source.downcast_ref() {
            Some(StreamError::Malformed { what: Malformed::Damaged(_), .. }) => READS_DAMAGED.to_owned(),
            _ => return None,
        },
        _ => return None,
    })
}

/// Adds to the error of the file at `address` the command that makes a file that can be read.
fn of(error: StreamError, address: &FileAddress) -> Remedied {
    let remedy = match &error {
        StreamError::Unsupported { what, .. } => command(what, address),
        StreamError::Malformed { what: Malformed::Damaged(_), .. } => Some(READS_DAMAGED.to_owned()),
        StreamError::Base { why, .. } => of_base(why),
        _ => None,
    };
    Remedied { error, remedy }
}

impl fmt::Display for Remedied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl Error for Remedied {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

fn command(what: &Unsupported, address: &FileAddress) -> Option<String> {
    let offset = address.offset();
    Some(match what {
        Unsupported::NeedsCapability { capability: "mapped-ram", .. } => {
            convert(&[bytes_of(address, offset)])
        }
        Unsupported::OtherFormat(OtherFormat::LibvirtSave { storage, stream_at: Some(before) }) => {
            let stream = bytes_of(address, offset + before);
            match storage {
                LibvirtStorage::Raw => convert(&[stream]),
                LibvirtStorage::Compressed(by) => convert(&[stream, decompress(*by)]),
                LibvirtStorage::Sparse => {
                    let file = format!("file:{},offset={}", name_of(address), offset + before);
                    format!("read its stream as it is, with {} as the file", quoted(&file))
                }
                _ => return None,
            }
        }
        Unsupported::OtherFormat(OtherFormat::Compressed(by)) => {
            convert(&[bytes_of(address, offset), decompress(*by)])
        }
        _ => return None,
    })
}

/// The command that makes a mapped-ram file of a stream.
fn convert(pipe: &[String]) -> String {
    let from = format!("exec:{}", pipe.join(" | "));
    format!("this makes a file NEW that can be read: multifd receive {} NEW", in_double_quotes(&from))
}

/// A command that writes the file from this offset on.
fn bytes_of(address: &FileAddress, offset: u64) -> String {
    let path = quoted(name_of(address));
    // A path may begin like an option.
    let path = if path.starts_with('-') { format!("./{path}") } else { path };
    match offset {
        0 => format!("cat {path}"),
        // The first byte is number 1.
        _ => format!("tail -c +{} {path}", offset + 1),
    }
}

/// The path as it can be typed. A name that cannot be shown as it is cannot be typed either: it stays a placeholder.
fn name_of(address: &FileAddress) -> &str {
    address.path().to_str().filter(|path| !path.contains(is_executed)).unwrap_or("FILE")
}

fn decompress(by: Compressor) -> String {
    format!("{} -dc", by.name())
}

/// A word of a shell command.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A word of a shell command that contains quoted words.
fn in_double_quotes(word: &str) -> String {
    let mut out = String::from('"');
    for c in word.chars() {
        if matches!(c, '"' | '\\' | '$' | '`') {
            out.push('\\');
        }
        out.push(c);
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> FileAddress {
        FileAddress::parse(text.into()).expect("an address")
    }

    fn of_libvirt(storage: LibvirtStorage) -> Unsupported {
        Unsupported::OtherFormat(OtherFormat::LibvirtSave { storage, stream_at: Some(100) })
    }

    #[test]
    fn command_names_the_path_the_offset_and_the_decompressor() {
        let told = |what, file| command(&what, &address(file)).expect("a remedy");
        let stream = Unsupported::NeedsCapability { what: "a stream", capability: "mapped-ram" };
        for (what, file, end) in [
            (stream.clone(), "vm", r#"multifd receive "exec:cat vm" NEW"#),
            (stream.clone(), "file:-vm,offset=8", r#"multifd receive "exec:tail -c +9 ./-vm" NEW"#),
            (of_libvirt(LibvirtStorage::Raw), "vm", r#""exec:tail -c +101 vm" NEW"#),
            (of_libvirt(LibvirtStorage::Raw), "file:vm,offset=4096", r#""exec:tail -c +4197 vm" NEW"#),
            (
                of_libvirt(LibvirtStorage::Compressed(Compressor::Zstd)),
                "vm",
                r#""exec:tail -c +101 vm | zstd -dc" NEW"#,
            ),
            (of_libvirt(LibvirtStorage::Sparse), "vm", "with file:vm,offset=100 as the file"),
            (
                Unsupported::OtherFormat(OtherFormat::Compressed(Compressor::Gzip)),
                "vm.gz",
                r#""exec:cat vm.gz | gzip -dc" NEW"#,
            ),
        ] {
            assert!(told(what.clone(), file).ends_with(end), "{}", told(what, file));
        }
        assert_eq!(command(&of_libvirt(LibvirtStorage::Unknown(9)), &address("vm")), None);
        assert_eq!(command(&Unsupported::Version(9), &address("vm")), None);
    }

    #[test]
    fn path_that_cannot_be_typed_is_a_placeholder() {
        let stream = Unsupported::NeedsCapability { what: "a stream", capability: "mapped-ram" };
        for name in ["a\u{1b}[2J", "a\nb", "a\u{202e}b"] {
            let told = command(&stream, &address(name)).expect("a remedy");
            assert!(told.ends_with(r#""exec:cat FILE" NEW"#), "{told}");
        }
    }

    #[test]
    fn shell_reads_the_path_as_it_is() {
        for name in ["a b", "it's", "$HOME", "a\"b", "`id`", "a\\b", "a;b"] {
            let command = in_double_quotes(&bytes_of(&address(name), 0));
            // Once for the user's shell, once for that of exec:.
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {command} | sed 's/^cat/printf %s/' | sh")])
                .output()
                .expect("a shell");
            assert_eq!(String::from_utf8_lossy(&output.stdout), name);
        }
    }
}
