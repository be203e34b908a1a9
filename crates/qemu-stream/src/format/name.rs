//! The name of a section: `ram`, `timer`, `0000:00:02.0/vga`.

use std::fmt;

use multifd::{live::DeviceName, ram::BlockName};

/// The name that identifies a section on both sides: 1 to 255 bytes, any value but NUL.
///
/// When shown, bytes outside printable ASCII are escaped.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionName(BlockName);

impl SectionName {
    /// Creates a name of `bytes`; `None` if it is empty, longer than 255 bytes or contains a NUL.
    pub fn new(bytes: impl AsRef<[u8]>) -> Option<Self> {
        BlockName::new(bytes).map(Self)
    }

    /// The bytes, without a terminator.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The name of the RAM section.
    pub(crate) fn ram() -> Self {
        Self(BlockName::new("ram").expect("three bytes, none NUL"))
    }

    pub(crate) fn as_name(&self) -> &BlockName {
        &self.0
    }
}

impl From<BlockName> for SectionName {
    fn from(name: BlockName) -> Self {
        Self(name)
    }
}

impl From<&DeviceName> for SectionName {
    fn from(name: &DeviceName) -> Self {
        Self(BlockName::new(name.as_str()).expect("both have 1 to 255 bytes without NUL"))
    }
}

impl fmt::Display for SectionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SectionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
