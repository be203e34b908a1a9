//! How far a destination had come before it failed, and what that says about the cause.
//!
//! The replies of a destination show it. A destination sends no reason, so the likely ones are listed.

use std::fmt;

/// The part of a migration that a destination has accepted, as its replies show. The text names the likely causes of a failure there,
/// the likeliest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Reached {
    /// It has not replied.
    #[default]
    Nothing,
    /// It has accepted the configuration.
    Configuration,
    /// It has all of RAM.
    Ram,
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => {
                "it had not replied yet; likely causes, the likeliest first: another machine type, TLS on one side only, another \
                 UUID, multifd on one side only"
            }
            Self::Configuration => {
                "it had accepted the machine type; likely causes, the likeliest first: another RAM size or other memory devices, \
                 another multifd-compression, another multifd-channels"
            }
            Self::Ram => {
                "it had all of RAM; likely causes, the likeliest first: other devices or other options of a device, another \
                 number of CPUs, a disk that it cannot open"
            }
        })
    }
}
