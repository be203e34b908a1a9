//! The table of the methods that this build supports.

use std::{fmt, str::FromStr};

#[cfg(feature = "zlib")]
use super::zlib;
#[cfg(feature = "zstd")]
use super::zstd;
use super::{
    Decode, DecoderMemory, Encode, Levels,
    codec::{Description, Level},
    none,
};
use crate::{
    error::{Result, Unsupported, Usage, Violation},
    wire::Flags,
};

macro_rules! methods {
    ($( $(#[doc = $doc:literal])* $(#[cfg($cfg:meta)])? $name:ident = $description:expr; )+) => {
        /// `multifd-compression`. Both sides have to use the same method; the destination checks it for every packet.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Method {
            /// Pages are sent uncompressed.
            #[default]
            None,
            $( $(#[doc = $doc])* $(#[cfg($cfg)])? $name, )+
        }

        impl Method {
            /// The methods that this build supports.
            pub const ALL: &[Self] = &[Self::None, $( $(#[cfg($cfg)])? Self::$name, )+];

            fn description(self) -> &'static Description {
                match self {
                    Self::None => &none::METHOD,
                    $( $(#[cfg($cfg)])? Self::$name => &$description, )+
                }
            }
        }
    };
}

methods! {
    /// One zlib stream per channel. QEMU has it since 5.0.
    #[cfg(feature = "zlib")]
    Zlib = zlib::METHOD;
    /// One zstd frame per channel. QEMU has it since 5.0, if QEMU was built with zstd.
    #[cfg(feature = "zstd")]
    Zstd = zstd::METHOD;
}

impl Method {
    /// QEMU's name of the method.
    pub fn as_str(self) -> &'static str {
        self.description().name
    }

    /// The methods that this build supports, for a text: `none, zlib or zstd`.
    pub fn names() -> String {
        let last = Self::ALL.len() - 1;
        let names = Self::ALL.iter().enumerate().map(|(at, method)| match at {
            0 => method.to_string(),
            _ if at == last => format!(" or {method}"),
            _ => format!(", {method}"),
        });
        names.collect()
    }

    /// The compression level, if the method has one: QEMU's `multifd-zlib-level`, `multifd-zstd-level`.
    pub fn level(self) -> Option<Level> {
        self.description().level
    }

    /// The method that the flags of a packet with pages name.
    pub(crate) fn of(flags: Flags) -> Result<Self, Unsupported> {
        let found = flags.masked(Flags::METHOD);
        let known = Self::ALL.iter().find(|method| method.flags() == found);
        known.copied().ok_or_else(|| Unsupported::Method {
            found,
            name: name_of(found),
            known: Self::names(),
        })
    }

    /// The flags of packets with pages.
    pub(crate) fn flags(self) -> Flags {
        self.description().flags
    }

    /// Refuses a packet with pages whose flags name another method.
    pub(crate) fn check(self, flags: Flags) -> Result<()> {
        if flags.masked(Flags::METHOD) == self.flags() {
            Ok(())
        } else {
            Err(Violation::Method { expected: self.as_str(), found: flags }.into())
        }
    }

    /// Creates the encoder; `None` if the pages themselves are the payload.
    ///
    /// # Errors
    /// If the library fails, for example because there is no memory.
    pub(crate) fn encoder(self, levels: Levels) -> Result<Option<Box<dyn Encode>>> {
        (self.description().encoder)(levels.of(self))
    }

    /// Creates the decoder; `None` if the pages themselves are the payload.
    ///
    /// # Errors
    /// As [`encoder`](Self::encoder).
    pub(crate) fn decoder(self, memory: &DecoderMemory) -> Result<Option<Box<dyn Decode>>> {
        (self.description().decoder)(memory)
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
        known.copied().ok_or_else(|| Usage::Method { found: text.to_owned(), known: Self::names() })
    }
}

/// QEMU's name of a method that this build does not support.
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
