//! Memory that the machine under this system has at hand.
//!
//! A virtual machine may give memory that is free for a while back to its host, and pays dearly for touching it again:
//! where this was written, 6 s a GiB instead of 0.3. That would be most of what a destination with fresh memory costs, or
//! nothing, by chance. So as much memory as a round is about to take is touched and freed right before it. The destination
//! still takes its faults and has its pages cleared, as anywhere.

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

/// For sockets, and whatever else a round takes.
const BESIDE: u64 = 128 << 20;
