//! The head of a save image of libvirt, and the XML in it.
//!
//! ```text
//! 0 "LibvirtQemudSave" | 16 version | 20 length of the data | 24 was running | 28 how it is stored | 32 cookie | 36 … 92
//! 92 XML of the guest, NUL [cookie, NUL] [zeros] ─ QEMU's stream, as it is or compressed
//! ```
//!
//! Its numbers are little-endian, as on all hosts with little-endian processors. The image is untrusted; nothing that it says
//! decides more than where its stream begins.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::format::{LibvirtStorage, OtherFormat};

/// What a save image of libvirt says besides its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtImage {
    /// The version of the head.
    pub version: u32,
    /// Whether the guest ran when it was saved; libvirt then lets it run when it restores it.
    pub was_running: bool,
    /// How its stream is stored.
    pub storage: LibvirtStorage,
    /// Where the stream begins, in bytes from the beginning of the file.
    pub stream_at: u64,
    /// The definition of the guest.
    pub xml: String,
}

impl LibvirtImage {
    /// Reads the head and the XML that begin at `offset`. `None` if there is no image, or its head is incomplete.
    ///
    /// # Errors
    /// If the system cannot read; if the XML is longer than [`MOST_XML`](Self::MOST_XML), or than the file.
    pub fn read(file: &File, offset: u64) -> io::Result<Option<Self>> {
        let mut head = [0; OtherFormat::HEAD];
        match file.read_exact_at(&mut head, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let Some(OtherFormat::LibvirtSave { storage, stream_at: Some(before) }) = OtherFormat::of(&head)
        else {
            return Ok(None);
        };
        let length = before.saturating_sub(OtherFormat::HEAD as u64);
        let too_long = || {
            let why = format!(
                "the XML of the libvirt image has {length} bytes, expected at most {}",
                Self::MOST_XML
            );
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        let length =
            usize::try_from(length).ok().filter(|length| *length <= Self::MOST_XML).ok_or_else(too_long)?;
        let left = file.metadata()?.len().saturating_sub(offset);
        if (length as u64) > left {
            let why = "the libvirt image ends inside its XML";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        let mut xml = vec![0; length];
        file.read_exact_at(&mut xml, offset + OtherFormat::HEAD as u64)?;
        let end = xml.iter().position(|byte| *byte == 0).unwrap_or(xml.len());
        xml.truncate(end);
        Ok(Some(Self {
            version: number(&head, 16),
            was_running: number(&head, 24) != 0,
            storage,
            stream_at: offset.saturating_add(before),
            xml: String::from_utf8_lossy(&xml).into_owned(),
        }))
    }

    /// The greatest length of the XML and of what follows it before the stream, in bytes.
    pub const MOST_XML: usize = 16 << 20;
}

/// A little-endian number of the head.
fn number(head: &[u8], at: usize) -> u32 {
    let bytes = head.get(at..at + 4).unwrap_or_default();
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}
