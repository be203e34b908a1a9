//! How packets name a device.

use std::fmt;

/// The name of a device: 1 to 255 bytes without NUL. When shown, unprintable bytes are escaped.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DeviceId(Box<[u8]>);

impl DeviceId {
    pub(super) fn new(name: &[u8]) -> Self {
        Self(name.into())
    }

    /// The name's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(f)
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}
