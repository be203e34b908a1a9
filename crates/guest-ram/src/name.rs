//! The name of a RAM block (`idstr`): 1 to 255 bytes, any value but NUL.

use std::{borrow::Borrow, fmt, str::Utf8Error};

/// The name that identifies a RAM block on both sides, such as `pc.ram` or `/rom@etc/acpi/tables`.
///
/// Names are bytes, not text: a device path may contain anything but a NUL. When shown, bytes outside printable ASCII
/// are escaped.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockName(Box<[u8]>);

impl BlockName {
    /// The greatest length in bytes. The wire stores the length in one byte and has 256 bytes for name and NUL.
    pub const MAX_LEN: usize = 255;

    /// Creates a name of `bytes`; `None` if it is empty, longer than 255 bytes or contains a NUL.
    pub fn new(bytes: impl AsRef<[u8]>) -> Option<Self> {
        let bytes = bytes.as_ref();
        let valid = !bytes.is_empty() && bytes.len() <= Self::MAX_LEN && !bytes.contains(&0);
        valid.then(|| Self(bytes.into()))
    }

    /// The bytes, without a terminator.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as text.
    ///
    /// # Errors
    /// If it is not UTF-8.
    pub fn to_str(&self) -> Result<&str, Utf8Error> {
        str::from_utf8(&self.0)
    }
}

// A name and its bytes are equal and hash alike, so a registry can be searched with bytes from the wire.
impl Borrow<[u8]> for BlockName {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_1_to_255_bytes_and_no_nul() {
        assert!(BlockName::new("").is_none());
        assert!(BlockName::new([b'x'; 255]).is_some());
        assert!(BlockName::new([b'x'; 256]).is_none());
        assert!(BlockName::new("pc\0ram").is_none());
    }

    #[test]
    fn a_name_that_is_not_text_is_shown_escaped() {
        let name = BlockName::new(b"a\xff\x1b[1m").expect("valid");
        assert_eq!(name.to_string(), r"a\xff\x1b[1m");
    }
}
