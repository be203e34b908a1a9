//! A device whose state an embedder provides.

use crate::format::name::SectionName;

/// A device of an embedder, sent as one section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: SectionName,
    /// The number that distinguishes devices with this name.
    pub instance: u32,
    /// The version of its state.
    pub version: u32,
    /// Its state.
    pub state: Vec<u8>,
}
