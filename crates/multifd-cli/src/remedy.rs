//! What to do with a file that is not a mapped-ram file: the command that works, with the user's own path.
//!
//! The libraries report what a file is. They know no path and no program, so the command is added here.

use std::{error::Error, fmt, io};

use multifd::error::is_executed;
use qemu_stream::{
    Error as StreamError,
    error::{BadBase, Malformed, Unsupported},
    format::{LibvirtStorage, OtherFormat},
    mapped_ram::{FoundFile, StoredMachine},
};

use crate::{
    file_address::{Digests, FileAddress, open_regular},
    output::outcome::While,
};

impl FileAddress {
    /// Opens the mapped-ram file at this address for reading, or a delta with its bases.
    pub(crate) fn open(&self, digests: Digests) -> Result<StoredMachine, While> {
        let found = self.found().map_err(|error| self.unreadable(error))?;
        let opened = StoredMachine::open_with(found, digests.into(), |delta, base| {
            FoundFile::beside(delta.path(), base)
        });
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
pub(crate) struct Remedied {
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
pub(crate) fn of(error: StreamError, address: &FileAddress) -> Remedied {
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
    match what {
        Unsupported::NeedsCapability { capability: "mapped-ram", .. }
        | Unsupported::OtherFormat(
            OtherFormat::Compressed(_)
            | OtherFormat::LibvirtSave {
                storage: LibvirtStorage::Raw | LibvirtStorage::Compressed(_) | LibvirtStorage::Sparse,
                stream_at: Some(_),
            },
        ) => {
            let file = address.typed(name_of(address));
            Some(format!("this makes a file NEW of it: multifd merge {} NEW", quoted(&dashed(file))))
        }
        _ => None,
    }
}

/// A path may begin like an option.
fn dashed(path: String) -> String {
    if path.starts_with('-') { format!("./{path}") } else { path }
}

/// The path as it can be typed. A name that cannot be shown as it is cannot be typed either: it stays a placeholder.
fn name_of(address: &FileAddress) -> &str {
    address.path().to_str().filter(|path| !path.contains(is_executed)).unwrap_or("FILE")
}

/// A word of a shell command.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use qemu_stream::format::Compressor;

    use super::*;

    fn address(text: &str) -> FileAddress {
        FileAddress::parse(text.into()).expect("an address")
    }

    fn of_libvirt(storage: LibvirtStorage) -> Unsupported {
        Unsupported::OtherFormat(OtherFormat::LibvirtSave { storage, stream_at: Some(100) })
    }

    #[test]
    fn command_names_the_path_and_the_offset() {
        let told = |what, file| command(&what, &address(file)).expect("a remedy");
        let stream = Unsupported::NeedsCapability { what: "a stream", capability: "mapped-ram" };
        for (what, file, end) in [
            (stream.clone(), "vm", "multifd merge vm NEW"),
            (stream.clone(), "./it's", r"multifd merge './it'\''s' NEW"),
            (stream.clone(), "file:-vm,offset=8", "multifd merge file:-vm,offset=0x8 NEW"),
            (stream, "file:-vm", "multifd merge ./-vm NEW"),
            (of_libvirt(LibvirtStorage::Raw), "vm", "multifd merge vm NEW"),
            (Unsupported::OtherFormat(OtherFormat::Compressed(Compressor::Gzip)), "a b", "merge 'a b' NEW"),
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
            assert!(told.ends_with("multifd merge FILE NEW"), "{told}");
        }
    }
}
