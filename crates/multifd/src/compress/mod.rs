//! The method: how pages become payload and payload becomes pages.
//!
//! A channel owns its codec for the whole migration. With [`Method::None`] there is none: pages leave guest
//! memory and arrive in it without passing through a buffer. `send` and `recv` know no method by name.

use std::fmt;

use crate::{
    error::{Result, Violation},
    ram::{PageIndex, RamBlock},
    wire::Flags,
};

/// `multifd-compression`: what both sides agree on, checked with every packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// Pages travel as they are.
    #[default]
    None,
}

impl Method {
    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
        }
    }

    /// The bits that packets with pages carry.
    pub(crate) fn flags(self) -> Flags {
        match self {
            Self::None => Flags::default(),
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
    pub(crate) fn encoder(self) -> Option<Box<dyn Encode>> {
        match self {
            Self::None => None,
        }
    }

    /// What reads payloads; `None` if the pages themselves are the payload.
    pub(crate) fn decoder(self) -> Option<Box<dyn Decode>> {
        match self {
            Self::None => None,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Makes the payload of one channel's packets.
pub(crate) trait Encode: Send {
    /// The payload of a packet with these pages.
    fn encode(&mut self, block: &RamBlock, pages: &[PageIndex]) -> Result<&[u8]>;
}

/// Reads the payload of one channel's packets.
pub(crate) trait Decode: Send {
    /// Fills `pages`, all pages of a packet in order, from its payload.
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<()>;
}
