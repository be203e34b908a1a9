//! The method: how pages become payload and payload becomes pages.
//!
//! ```text
//! pages ─copy─▶ Encode ─▶ payload ═══ channel ═══▶ payload ─▶ Decode ─▶ pages
//! ```
//!
//! A channel owns its codec for the whole migration: what one packet held makes the next one smaller, and only a
//! channel's first payload begins as its format does. With [`Method::None`] there is none. Each method is described in
//! a file of its own, by its `METHOD`; `send` and `recv` know none by name.

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
