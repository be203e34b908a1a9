//! `multifd send` to `multifd receive` from host to host, over a line that is rough: what arrives is what was sent, or both
//! say in time why it has not.
//!
//! ```text
//!   near: multifd send ══ 1 + 4 TCP connections, plain or TLS, through the kernel's TUN devices ══ far: multifd receive
//! ```
//!
//! What needs two hosts is skipped, and listed, where this machine does not let us have them.

#[cfg(test)]
#[expect(dead_code, reason = "a part of what the program's other tests need")]
#[path = "../it/kit.rs"]
mod kit;
#[cfg(test)]
mod lines;
