//! Why a description of devices does not fit.

use multifd::error::UntrustedText;

use crate::format::name::SectionName;

/// Why a description does not fit the sections before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// It is not JSON, or not of the expected shape.
    #[error("description: {0}")]
    Json(UntrustedText),
    /// There is a different section at the described place.
    #[error("at {at:#x}: expected section of device \"{name}\" instance {instance}")]
    Device {
        /// Where in the device part.
        at: usize,
        /// The device described.
        name: UntrustedText,
        /// Its instance.
        instance: i64,
    },
    /// The footer is not where the described length puts it.
    #[error("at {at:#x}: expected the footer of device \"{name}\", whose body has {length:#x} bytes")]
    Footer {
        /// Where in the device part.
        at: usize,
        /// The device described.
        name: SectionName,
        /// The described length of its body.
        length: u64,
    },
    /// The body extends beyond the sections.
    #[error("at {at:#x}: device \"{name}\" reaches beyond the last section")]
    Beyond {
        /// Where in the device part.
        at: usize,
        /// The device described.
        name: SectionName,
    },
    /// More sections follow than are described.
    #[error("{left:#x} bytes after the last described device")]
    Left {
        /// The number of bytes.
        left: usize,
    },
}
