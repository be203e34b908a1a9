//! The peers: each moves RAM once, from the start to the moment at which it is loaded.
//!
//! ```text
//! pair     any source to any destination: QEMU 10.0, the engine
//! iperf    the socket alone
//! copy     memory alone
//! file     a guest into a file and out of it
//! demo     a guest that writes at the same time
//! ```

pub(crate) mod child;
pub(crate) mod copy;
pub(crate) mod demo;
pub(crate) mod engine;
pub(crate) mod file;
pub(crate) mod iperf;
pub(crate) mod pair;
pub(crate) mod qemu;
mod warm;

use std::fs;

use crate::{Result, contents::Contents};

/// What is to be moved, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// In bytes.
    pub(crate) ram: u64,
    pub(crate) contents: Contents,
    pub(crate) channels: u8,
    pub(crate) method: &'static str,
    pub(crate) tls: bool,
    /// Whether to measure with memory that the machine must fetch first.
    pub(crate) cold: bool,
}

/// The cost of one round.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    /// Of RAM, or of payload.
    pub(crate) bytes: u64,
    /// Seconds of CPU time at the source, and at the destination.
    pub(crate) cpu: Option<[f64; 2]>,
    /// Bytes on the wire.
    pub(crate) wire: Option<u64>,
    /// Peak resident memory beyond RAM, in bytes, at the source and at the destination.
    pub(crate) beyond: Option<[u64; 2]>,
    /// The milliseconds for which the guest was stopped.
    pub(crate) downtime: Option<u64>,
}

/// A peer that can be measured repeatedly.
pub(crate) trait Peer {
    /// Moves everything once.
    fn round(&mut self) -> Result<Sample>;
}

/// The CPU time that a process has used, including threads that have ended, in seconds.
pub(crate) fn cpu(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in brackets, may contain anything; the fields from the third on follow it.
    let (_, fields) = text.rsplit_once(')').ok_or("the system's line on a process")?;
    let mut times = fields.split_ascii_whitespace().skip(11).map(str::parse::<u64>);
    let (Some(user), Some(system)) = (times.next(), times.next()) else { return Err("no times".into()) };
    Ok((user? + system?) as f64 / rustix::param::clock_ticks_per_second() as f64)
}
