//! The name of a device of the guest: 1 to 255 bytes of text without NUL.

use std::{borrow::Cow, fmt, str::FromStr};

use crate::error::{Printable, UntrustedText, Usage};

/// The name that identifies a device on both sides, together with its instance, such as `counter` or `virtio-net`: text of
/// 1 to 255 bytes without NUL. A name that exists can be sent.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName(Cow<'static, str>);

impl DeviceName {
    /// The greatest length in bytes. The wire stores the length in one byte.
    pub const MAX_LEN: usize = 255;

    /// Creates a name.
    ///
    /// # Errors
    /// [`Usage::DeviceName`] if it is empty, longer than 255 bytes, or contains a NUL.
    pub fn new(name: impl Into<String>) -> Result<Self, Usage> {
        let name = name.into();
        if is_valid(&name) {
            Ok(Self(Cow::Owned(name)))
        } else {
            Err(Usage::DeviceName { found: name.into() })
        }
    }

    /// Creates a name that is part of the program. In a constant, an invalid name is an error of the compiler.
    ///
    /// ```
    /// use multifd::live::DeviceName;
    ///
    /// const COUNTER: DeviceName = DeviceName::from_static("counter");
    /// assert_eq!(COUNTER.as_str(), "counter");
    /// ```
    ///
    /// # Panics
    /// If it is empty, longer than 255 bytes, or contains a NUL.
    pub const fn from_static(name: &'static str) -> Self {
        assert!(is_valid(name), "the name of a device has 1 to 255 bytes without NUL");
        Self(Cow::Borrowed(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

const fn is_valid(name: &str) -> bool {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == 0 {
            return false;
        }
        at += 1;
    }
    !bytes.is_empty() && bytes.len() <= DeviceName::MAX_LEN
}

impl AsRef<str> for DeviceName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = Usage;

    fn from_str(name: &str) -> Result<Self, Usage> {
        Self::new(name)
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Printable(&self.0).fmt(f)
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        UntrustedText::from(self.as_str()).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_1_to_255_bytes_and_no_nul() {
        for invalid in ["", "a\0b", "\0", &"x".repeat(256), &"ö".repeat(128)] {
            let refused = DeviceName::new(invalid).expect_err("refused").to_string();
            assert!(refused.contains("1 to 255 bytes without NUL"), "{refused}");
            assert!(std::panic::catch_unwind(|| DeviceName::from_static(invalid.to_owned().leak())).is_err());
        }
        for valid in ["x", &"x".repeat(255), "größe", " "] {
            assert_eq!(DeviceName::new(valid).expect("valid").as_str(), valid);
            assert_eq!(DeviceName::from_static(valid.to_owned().leak()), valid.parse().expect("valid"));
        }
    }

    #[test]
    fn a_name_is_shown_without_what_a_terminal_would_execute() {
        let name = DeviceName::new("a\u{1b}[2J").expect("valid");
        assert_eq!((name.to_string(), format!("{name:?}")), (r"a\u{1b}[2J".into(), r#""a\u{1b}[2J""#.into()));
    }
}
