//! The method: how pages become payload and payload becomes pages.
//!
//! ```text
//! pages ─copy─▶ Encode ─▶ payload ═══ channel ═══▶ payload ─▶ Decode ─▶ pages
//! ```
//!
//! A channel owns its codec for the whole migration: what one packet held makes the next one smaller, and only a
//! channel's first payload begins as its format does. With [`Method::None`] there is none: pages leave guest memory
//! and arrive in it without passing through a buffer. `send` and `recv` know no method by name.

mod codec;
#[cfg(feature = "zlib")]
mod deflate;
#[cfg(any(feature = "zlib", feature = "zstd"))]
mod sieve;
#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

use std::{fmt, str::FromStr};

pub(crate) use codec::{Decode, Encode, Pages};

use crate::{
    error::{Result, Unsupported, Usage, Violation},
    parameters,
    wire::Flags,
};

/// `multifd-compression`: what both sides agree on, checked with every packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// Pages travel as they are.
    #[default]
    None,
    /// One zlib stream a channel. QEMU has it since 5.0.
    #[cfg(feature = "zlib")]
    Zlib,
    /// One zstd frame a channel. QEMU has it since 5.0, if it is built with it.
    #[cfg(feature = "zstd")]
    Zstd,
}

/// How hard each method tries; of no matter to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Levels {
    pub(crate) zlib: u8,
    pub(crate) zstd: u8,
}

impl Default for Levels {
    fn default() -> Self {
        Self { zlib: 1, zstd: 1 }
    }
}

impl Levels {
    pub(crate) fn check(self) -> Result<(), Usage> {
        parameters::MULTIFD_ZLIB_LEVEL.check(self.zlib)?;
        parameters::MULTIFD_ZSTD_LEVEL.check(self.zstd)
    }
}

impl Method {
    /// The methods that this build speaks.
    pub const ALL: &[Self] = &[
        Self::None,
        #[cfg(feature = "zlib")]
        Self::Zlib,
        #[cfg(feature = "zstd")]
        Self::Zstd,
    ];

    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            #[cfg(feature = "zlib")]
            Self::Zlib => "zlib",
            #[cfg(feature = "zstd")]
            Self::Zstd => "zstd",
        }
    }

    /// The method that a packet with pages names.
    pub(crate) fn of(flags: Flags) -> Result<Self, Unsupported> {
        let met = flags.masked(Flags::METHOD);
        let known = Self::ALL.iter().find(|method| method.flags() == met);
        known.copied().ok_or_else(|| Unsupported::Method { met, name: name_of(met) })
    }

    /// The bits that packets with pages carry.
    pub(crate) fn flags(self) -> Flags {
        match self {
            Self::None => Flags::default(),
            #[cfg(feature = "zlib")]
            Self::Zlib => Flags::ZLIB,
            #[cfg(feature = "zstd")]
            Self::Zstd => Flags::ZSTD,
        }
    }

    /// Refuses a packet with pages that names another method.
    pub(crate) fn check(self, flags: Flags) -> Result<()> {
        if flags.masked(Flags::METHOD) == self.flags() {
            Ok(())
        } else {
            Err(Violation::Method { expected: self.as_str(), met: flags }.into())
        }
    }

    /// What makes payloads; `None` if the pages themselves are the payload.
    ///
    /// # Errors
    /// If the library behind the method refuses, for want of memory say.
    pub(crate) fn encoder(self, levels: Levels) -> Result<Option<Box<dyn Encode>>> {
        match self {
            Self::None => {
                let _ = levels;
                Ok(None)
            }
            #[cfg(feature = "zlib")]
            Self::Zlib => Ok(Some(Box::new(zlib::Encoder::new(levels.zlib)))),
            #[cfg(feature = "zstd")]
            Self::Zstd => Ok(Some(Box::new(zstd::Encoder::new(levels.zstd)?))),
        }
    }

    /// What reads payloads; `None` if the pages themselves are the payload.
    ///
    /// # Errors
    /// As [`encoder`](Self::encoder).
    pub(crate) fn decoder(self) -> Result<Option<Box<dyn Decode>>> {
        match self {
            Self::None => Ok(None),
            #[cfg(feature = "zlib")]
            Self::Zlib => Ok(Some(Box::new(zlib::Decoder::new()))),
            #[cfg(feature = "zstd")]
            Self::Zstd => Ok(Some(Box::new(zstd::Decoder::new()?))),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Method {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Self, Usage> {
        let known = Self::ALL.iter().find(|method| method.as_str() == text);
        known.copied().ok_or_else(|| Usage::Method { met: text.to_owned() })
    }
}

/// QEMU's name of a method that this build does not speak.
fn name_of(flags: Flags) -> &'static str {
    match flags {
        Flags::ZLIB => "zlib",
        Flags::ZSTD => "zstd",
        Flags::QPL => "qpl",
        Flags::UADK => "uadk",
        Flags::QATZIP => "qatzip",
        _ => "unknown",
    }
}

#[cfg(test)]
#[cfg(any(feature = "zlib", feature = "zstd"))]
mod tests;
