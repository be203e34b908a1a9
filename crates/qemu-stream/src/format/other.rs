//! Recognises streams and files of other programs by their first bytes.
//!
//! The input is the first bytes of what should be QEMU's stream, from a connection or a file, and untrusted. The output is a
//! name for the error text and, for a save image of libvirt, the place of the stream inside it. Nothing is read beyond the
//! bytes given.
//!
//! A save image begins with this head. Its numbers are little-endian, as on all hosts with little-endian processors:
//!
//! ```text
//! 0 "LibvirtQemudSave" | 16 u32 version | 20 u32 length of the XML | 24 u32 was running | 28 u32 compression | … | 92 XML, stream
//! ```

use std::fmt;

/// A format that is not QEMU's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OtherFormat {
    /// A save image of libvirt, written by `virsh save` or `virsh managedsave`.
    LibvirtSave {
        /// How its stream is stored.
        storage: LibvirtStorage,
        /// The number of bytes before the stream: the head and the XML. `None` if the head is not complete.
        stream_at: Option<u64>,
    },
    /// A save image of libvirt whose writer did not finish.
    LibvirtPartial,
    /// A memory dump without device state: ELF or kdump.
    MemoryDump,
    /// A qcow2 disk image.
    DiskImage,
    /// A compressed stream or file.
    Compressed(Compressor),
    /// The first bytes of a TLS session.
    Tls,
    /// A recording of a migration, by `multifd record`.
    Recording,
}

/// How libvirt has stored the stream in a save image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LibvirtStorage {
    /// As QEMU has written it.
    Raw,
    /// Compressed.
    Compressed(Compressor),
    /// As a mapped-ram file.
    Sparse,
    /// A number that is not known.
    Unknown(u32),
}

/// A program that compresses files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compressor {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// lzop.
    Lzop,
    /// zstd.
    Zstd,
}

impl OtherFormat {
    /// The number of first bytes that are enough to recognise every format.
    pub const HEAD: usize = LIBVIRT_HEAD;

    /// The format of what begins with these bytes; `None` if it is not known. Fewer than [`HEAD`](Self::HEAD) bytes may leave
    /// out the details.
    pub fn of(head: &[u8]) -> Option<Self> {
        if head.starts_with(LIBVIRT_SAVE) {
            let stream_at = number(head, 20).filter(|_| head.len() >= LIBVIRT_HEAD);
            return Some(Self::LibvirtSave {
                storage: LibvirtStorage::of(number(head, 28).unwrap_or(u32::MAX)),
                stream_at: stream_at.map(|xml| LIBVIRT_HEAD as u64 + u64::from(xml)),
            });
        }
        let found = [
            (LIBVIRT_PARTIAL, Self::LibvirtPartial),
            (b"\x7fELF", Self::MemoryDump),
            (b"KDUMP   ", Self::MemoryDump),
            (b"makedumpfile\0", Self::MemoryDump),
            (b"QFI\xfb", Self::DiskImage),
            (b"\x1f\x8b", Self::Compressed(Compressor::Gzip)),
            (b"BZh", Self::Compressed(Compressor::Bzip2)),
            (b"\xfd7zXZ\0", Self::Compressed(Compressor::Xz)),
            (b"\x89LZO\0", Self::Compressed(Compressor::Lzop)),
            (b"\x28\xb5\x2f\xfd", Self::Compressed(Compressor::Zstd)),
            (b"\x93MFDREC\n", Self::Recording),
            (b"\x16\x03", Self::Tls),
            (b"\x15\x03", Self::Tls),
        ];
        found.into_iter().find_map(|(magic, format)| head.starts_with(magic).then_some(format))
    }
}

impl LibvirtStorage {
    fn of(number: u32) -> Self {
        match number {
            0 => Self::Raw,
            1 => Self::Compressed(Compressor::Gzip),
            2 => Self::Compressed(Compressor::Bzip2),
            3 => Self::Compressed(Compressor::Xz),
            4 => Self::Compressed(Compressor::Lzop),
            5 => Self::Compressed(Compressor::Zstd),
            6 => Self::Sparse,
            unknown => Self::Unknown(unknown),
        }
    }
}

impl Compressor {
    /// The name of the program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
            Self::Lzop => "lzop",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for OtherFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LibvirtSave { storage, stream_at } => {
                f.write_str("a save image of libvirt (virsh save), ")?;
                match storage {
                    LibvirtStorage::Raw => f.write_str("not compressed")?,
                    LibvirtStorage::Compressed(by) => write!(f, "compressed with {}", by.name())?,
                    LibvirtStorage::Sparse => f.write_str("format sparse")?,
                    LibvirtStorage::Unknown(number) => write!(f, "in the unknown format {number:#x}")?,
                }
                match stream_at {
                    Some(at) => write!(f, ": QEMU's stream begins after {at} bytes"),
                    None => f.write_str(": it ends inside its head"),
                }
            }
            Self::LibvirtPartial => {
                f.write_str("an incomplete save image of libvirt: virsh save did not finish")
            }
            Self::Recording => {
                f.write_str("a recording of a migration: multifd merge FILE NEW makes a file of the machine in it")
            }
            Self::MemoryDump => f.write_str(
                "a memory dump (ELF or kdump) without device state, from which no guest can be restored: save the guest with \
                 virsh save, or with virsh dump without --memory-only",
            ),
            Self::DiskImage => f.write_str(
                "a qcow2 disk image: file:IMAGE,snapshot=NAME names a machine in it that savevm has saved",
            ),
            Self::Compressed(by) => write!(f, "compressed with {}: decompress it first", by.name()),
            Self::Tls => f.write_str("TLS, which this side does not expect here"),
        }
    }
}

/// A little-endian number of a save image's head.
fn number(head: &[u8], at: usize) -> Option<u32> {
    let bytes = head.get(at..at + 4)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte)))
}

const LIBVIRT_SAVE: &[u8] = b"LibvirtQemudSave";
const LIBVIRT_PARTIAL: &[u8] = b"LibvirtQemudPart";
const LIBVIRT_HEAD: usize = 92;

#[cfg(test)]
mod tests {
    use super::*;

    fn image(xml: u32, compression: u32) -> Vec<u8> {
        let mut head = vec![0; LIBVIRT_HEAD];
        head[..16].copy_from_slice(LIBVIRT_SAVE);
        head[16] = 2;
        for (at, number) in [(20, xml), (28, compression)] {
            for (byte, place) in head[at..at + 4].iter_mut().enumerate() {
                *place = u8::try_from(number >> (8 * byte) & 0xff).expect("a byte");
            }
        }
        head
    }

    #[test]
    fn every_storage_of_a_libvirt_image_is_named_with_the_place_of_its_stream() {
        let names = ["not compressed", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse", "unknown format 0x7"];
        for (number, name) in (0..).zip(names) {
            let found = OtherFormat::of(&image(0x1234, number)).expect("recognised");
            assert!(matches!(found, OtherFormat::LibvirtSave { stream_at: Some(4752), .. }), "{found:?}");
            let text = found.to_string();
            assert!(text.contains(name) && text.ends_with("begins after 4752 bytes"), "{text}");
        }
    }

    #[test]
    fn head_of_a_libvirt_image_may_be_cut_or_hold_any_number() {
        let whole = image(u32::MAX, u32::MAX);
        for length in 16..LIBVIRT_HEAD {
            let found = OtherFormat::of(&whole[..length]).expect("recognised");
            assert!(matches!(found, OtherFormat::LibvirtSave { stream_at: None, .. }), "{length}: {found:?}");
        }
        let found = OtherFormat::of(&whole);
        assert!(
            matches!(found, Some(OtherFormat::LibvirtSave { stream_at: Some(at), .. }) if at == 92 + u64::from(u32::MAX))
        );
    }

    #[test]
    fn other_files_are_named_and_a_stream_of_qemu_is_not_one() {
        for (head, name) in [
            (&b"LibvirtQemudPart\x02\0\0\0"[..], "did not finish"),
            (b"\x7fELF\x02\x01\x01", "memory dump"),
            (b"KDUMP   ", "memory dump"),
            (b"QFI\xfb\0\0\0\x03", "qcow2"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (b"\x28\xb5\x2f\xfd\x04", "zstd"),
            (b"\x16\x03\x01\x02\0", "TLS"),
        ] {
            let found = OtherFormat::of(head).expect("recognised").to_string();
            assert!(found.contains(name), "{found}");
        }
        for head in [&b"QEVM\0\0\0\x03"[..], b"", b"\x7f", b"Libvirt", b"\x16"] {
            assert_eq!(OtherFormat::of(head), None);
        }
    }
}
