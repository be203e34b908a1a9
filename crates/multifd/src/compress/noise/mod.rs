//! Pages of noise, which the libraries spend most of their time on and cannot make smaller.
//!
//! ```text
//! page ─▶ sieve ── noise and runs ──▶ deflate blocks of our own (zlib), sequences of our own (zstd)
//!              └── anything else ────▶ the library
//! ```
//!
//! This only saves time: what it writes is the method's own format. Without this folder each method's `METHOD` names its
//! plain stream for every level, and nothing else changes.

#[cfg(feature = "zlib")]
mod deflate;
mod sieve;
#[cfg(feature = "zlib")]
pub(super) mod zlib;
#[cfg(feature = "zstd")]
pub(super) mod zstd;
