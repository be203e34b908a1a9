//! Identities on the wire: the number of a channel and the UUID of a machine.

use std::{fmt, str::FromStr};

/// The number of a channel, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub u8);

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The UUID of a virtual machine, in the byte order of its text. All zero means that no UUID was given.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VmUuid(pub [u8; 16]);

impl VmUuid {
    /// The UUID of a machine without a UUID.
    pub const NIL: Self = Self([0; 16]);

    /// Whether this is [`VmUuid::NIL`].
    pub fn is_nil(&self) -> bool {
        *self == Self::NIL
    }
}

impl fmt::Display for VmUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for VmUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The text is not a UUID of the form `00112233-4455-6677-8899-aabbccddeeff`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a UUID like 00112233-4455-6677-8899-aabbccddeeff, found {0:?}")]
pub struct ParseUuidError(String);

impl FromStr for VmUuid {
    type Err = ParseUuidError;

    fn from_str(text: &str) -> Result<Self, ParseUuidError> {
        let refused = || ParseUuidError(text.to_owned());
        let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
        let dashes: Vec<usize> =
            text.bytes().enumerate().filter(|(_, b)| *b == b'-').map(|(i, _)| i).collect();
        if digits.len() != 32 || !(dashes.is_empty() || dashes == [8, 13, 18, 23]) {
            return Err(refused());
        }
        let mut uuid = Self::NIL;
        for (byte, pair) in uuid.0.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = str::from_utf8(pair).map_err(|_| refused())?;
            if pair.starts_with('+') {
                return Err(refused());
            }
            *byte = u8::from_str_radix(pair, 0x10).map_err(|_| refused())?;
        }
        Ok(uuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_back_as_written() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        let uuid: VmUuid = text.parse().expect("a UUID");
        assert_eq!(uuid.to_string(), text);
        assert_eq!(text.replace('-', "").parse(), Ok(uuid));
    }

    #[test]
    fn text_that_is_no_uuid_is_refused() {
        for text in [
            "",
            "0011",
            "00112233-4455-6677-8899-aabbccddeef",
            "0011223-34455-6677-8899-aabbccddeeff",
            "+0112233-4455-6677-8899-aabbccddeeff",
            "g0112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert!(text.parse::<VmUuid>().is_err(), "{text}");
        }
    }
}
