//! A device whose state an embedder gives.

use crate::format::name::SectionName;

/// A device of an embedder's own, to be sent as one section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: SectionName,
    /// Which of several of that name.
    pub instance: u32,
    /// The version of its state.
    pub version: u32,
    /// Its state.
    pub state: Vec<u8>,
}
