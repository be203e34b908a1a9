//! The forms in which a machine is stored.

use std::{fmt, io};

use qemu_stream::{
    Error,
    error::Unsupported,
    format::{Compressor, LibvirtStorage, OtherFormat},
    stored::{LibvirtImage, Snapshot},
};

use super::snapshot::ChosenSnapshot;
use crate::file_address::FileAddress;

/// The form in which a machine is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A mapped-ram file, or a delta and its bases.
    MappedRam,
    /// A stream of QEMU, one byte after the other.
    Stream,
    /// The same, compressed.
    Compressed(Compressor),
    /// A save image of libvirt.
    Libvirt(LibvirtImage),
    /// A snapshot in a qcow2 image.
    Snapshot(Snapshot),
    /// The recording of a migration.
    Recording,
}

impl Form {
    /// The program that has compressed it.
    pub(crate) fn compressor(&self) -> Option<Compressor> {
        match self {
            Self::Compressed(by) => Some(*by),
            Self::Libvirt(LibvirtImage { storage: LibvirtStorage::Compressed(by), .. }) => Some(*by),
            _ => None,
        }
    }

    /// Whether pages are in the file itself, so that digests can be added to it.
    pub(crate) fn is_in_place(&self) -> bool {
        match self {
            Self::MappedRam => true,
            Self::Libvirt(image) => image.storage == LibvirtStorage::Sparse,
            Self::Stream | Self::Compressed(_) | Self::Snapshot(_) | Self::Recording => false,
        }
    }
}

/// What was found at an address that holds no mapped-ram file. What had to be opened to find that out stays open.
#[derive(Debug)]
pub(super) enum Found {
    Stream,
    Compressed(Compressor),
    Libvirt(LibvirtImage),
    Snapshot(ChosenSnapshot),
    Recording,
}

impl Found {
    /// What is in a file that cannot be opened as a mapped-ram file. `None` if it is none that is known, or its stream is stored
    /// in an unknown way.
    ///
    /// # Errors
    /// If the head of a libvirt image cannot be read, or it is not clear which snapshot of a qcow2 image is meant.
    pub(super) fn of(error: &Error, at: &FileAddress) -> io::Result<Option<Self>> {
        let Error::Unsupported { what, .. } = error else { return Ok(None) };
        Ok(match what {
            Unsupported::NeedsCapability { capability: "mapped-ram", .. } => Some(Self::Stream),
            Unsupported::OtherFormat(OtherFormat::Compressed(by)) => Some(Self::Compressed(*by)),
            Unsupported::OtherFormat(OtherFormat::LibvirtSave { storage, .. }) if is_known(*storage) => {
                LibvirtImage::read(&at.found()?.file, at.offset())?.map(Self::Libvirt)
            }
            Unsupported::OtherFormat(OtherFormat::DiskImage) => {
                Some(Self::Snapshot(ChosenSnapshot::open(at)?))
            }
            Unsupported::OtherFormat(OtherFormat::Recording) => Some(Self::Recording),
            _ => None,
        })
    }

    pub(super) fn form(&self) -> Form {
        match self {
            Self::Stream => Form::Stream,
            Self::Compressed(by) => Form::Compressed(*by),
            Self::Libvirt(image) => Form::Libvirt(image.clone()),
            Self::Snapshot(chosen) => Form::Snapshot(chosen.snapshot().clone()),
            Self::Recording => Form::Recording,
        }
    }
}

fn is_known(storage: LibvirtStorage) -> bool {
    matches!(storage, LibvirtStorage::Raw | LibvirtStorage::Compressed(_) | LibvirtStorage::Sparse)
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MappedRam => f.write_str("a mapped-ram file"),
            Self::Stream => f.write_str("a stream of QEMU"),
            Self::Compressed(by) => write!(f, "a stream of QEMU, compressed with {}", by.name()),
            Self::Libvirt(image) => {
                let how = match image.storage {
                    LibvirtStorage::Compressed(by) => by.name(),
                    LibvirtStorage::Sparse => "sparse",
                    _ => "raw",
                };
                write!(f, "a save image of libvirt, {how}")
            }
            Self::Snapshot(snapshot) => write!(f, "a snapshot in a qcow2 image, {}", snapshot.name),
            Self::Recording => f.write_str("a recording of a migration"),
        }
    }
}
