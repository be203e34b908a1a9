//! Free memory: how much there is, and whether the host of this system has provided it already.
//!
//! A virtual machine may return memory that is free for a while to its host, and touching it again is then expensive: 6
//! s per GiB instead of 0.3 where this was written. This would dominate the cost of a destination with fresh memory, or
//! not occur, by chance. So the amount of memory that a round needs is touched and freed just before it. The
//! destination still has its page faults and the kernel still clears its pages, as on any machine.

use std::fs;

use multifd::ram::Mapping;

use crate::{Result, contents::PAGE};

/// Bytes that this system can provide.
pub(crate) fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    Ok(line.ok_or("/proc/meminfo has no MemAvailable")?.parse::<u64>()? << 10)
}

/// Touches and frees as much memory.
pub(crate) fn warm(bytes: u64) -> Result<()> {
    let memory = Mapping::anonymous(bytes)?;
    for at in (0..memory.len()).step_by(PAGE) {
        memory.slice(at, 1).ok_or("inside")?.copy_from(&[1]);
    }
    Ok(())
}
