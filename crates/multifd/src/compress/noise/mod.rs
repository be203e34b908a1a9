//! Pages of noise. The libraries spend most of their time on them and cannot make them smaller.
//!
//! ```text
//! page ─▶ sieve ── noise and runs ──▶ deflate blocks of our own (zlib), sequences of our own (zstd)
//!              └── anything else ────▶ the library
//! ```
//!
//! This only saves time: it writes the method's own format. Without this folder, the `METHOD` of each method would use its
//! plain stream for every level, and nothing else would change.

#[cfg(feature = "zlib")]
mod deflate;
mod sieve;
#[cfg(feature = "zlib")]
pub(super) mod zlib;
#[cfg(feature = "zstd")]
pub(super) mod zstd;
