//! The compression methods: pages become a payload, and a payload becomes pages.
//!
//! ```text
//! pages ─copy─▶ Encode ─▶ payload ═══ channel ═══▶ payload ─▶ Decode ─▶ pages
//! ```
//!
//! A channel owns its codec for the whole migration: the contents of earlier packets make later ones smaller, and only the
//! first payload of a channel has the header of its format. [`Method::None`] has no codec. Each method is described in a
//! file of its own, by its `METHOD`; `send` and `recv` do not name any method.

mod codec;
mod levels;
mod memory;
mod method;
#[cfg(feature = "_codec")]
mod noise;
mod none;
#[cfg(feature = "_codec")]
mod stream;
#[cfg(test)]
#[cfg(feature = "_codec")]
mod tests;
#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

pub use codec::Level;
pub(crate) use codec::{Decode, Encode, PacketPages};
pub(crate) use levels::Levels;
pub(crate) use memory::DecoderMemory;
pub use method::Method;
