//! Makes sure that the host of this system has provided the memory already.
//!
//! A virtual machine may return memory that is free for a while to its host, and touching it again is then expensive: 6
//! s per GiB instead of 0.3 where this was written. This would dominate the cost of a destination with fresh memory, or
//! not occur, by chance. So the amount of memory that a round needs is touched and freed just before it. The
//! destination still has its page faults and the kernel still clears its pages, as on any machine.

use multifd::ram::Mapping;

use super::Setting;
use crate::{
    Result,
    contents::{Contents, PAGE},
};

pub(super) fn warm(setting: &Setting) -> Result<()> {
    if setting.cold {
        return Ok(());
    }
    let ram = if setting.contents == Contents::Untouched { 0 } else { setting.ram };
    let memory = Mapping::anonymous(ram + BESIDE)?;
    for at in (0..memory.len()).step_by(PAGE) {
        memory.slice(at, 1).ok_or("inside")?.copy_from(&[1]);
    }
    Ok(())
}

/// For sockets, and everything else that a round needs.
const BESIDE: u64 = 128 << 20;
