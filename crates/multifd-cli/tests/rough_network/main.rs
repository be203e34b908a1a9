//! `multifd send` to `multifd receive` from host to host, over an unreliable line: the file arrives unchanged, or both
//! print in time why it did not.
//!
//! ```text
//!   near: multifd send ══ 1 + 4 TCP connections, plain or TLS, through the kernel's TUN devices ══ far: multifd receive
//! ```
//!
//! Tests that need two hosts are skipped and listed if this machine cannot create them.
#![expect(clippy::disallowed_methods, reason = "a test shows its own paths")]

#[cfg(test)]
#[expect(dead_code, reason = "a part of what the program's other tests need")]
#[path = "../it/kit.rs"]
mod kit;
#[cfg(test)]
mod lines;
#[cfg(test)]
mod postcopy;
