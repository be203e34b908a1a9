//! Touches as much memory as a round needs, before the round.

use super::Setting;
use crate::{Result, contents::Contents, free};

pub(super) fn warm(setting: &Setting) -> Result<()> {
    if setting.cold {
        return Ok(());
    }
    let ram = if setting.contents == Contents::Untouched { 0 } else { setting.ram };
    free::warm(ram + BESIDE)
}

/// For sockets, and everything else that a round needs.
const BESIDE: u64 = 128 << 20;
