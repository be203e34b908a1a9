//! The parts of one migration except its channels: what the passes use, and what the embedder controls and reads.

use std::{sync::Arc, time::Duration};

use super::{
    caught::caught,
    control::Gate,
    guest::{self, DeviceInfo, Guest},
    progress::Progress,
};
use crate::{
    channel::{Callbacks, Stop},
    error::{Result, Usage},
    options::MigrateOptions,
    outcome::Callback,
    ram::RamBlocks,
};

/// The parts of a migration.
pub(super) struct Plan {
    pub(super) options: MigrateOptions,
    pub(super) blocks: Arc<RamBlocks>,
    pub(super) stop: Stop,
    pub(super) progress: Progress,
    pub(super) gate: Gate,
    pub(super) calls: Callbacks,
    /// How long a callback may run; `None` is no limit.
    pub(super) callback_timeout: Option<Duration>,
}

impl Plan {
    /// The devices of a guest, after the checks that depend only on the guest.
    pub(super) fn devices_of(&self, guest: &dyn Guest) -> Result<Vec<DeviceInfo>> {
        let devices = caught(&self.calls, Callback::GuestDevices, || guest.devices())?;
        guest::check_distinct(&devices)?;
        if self.options.auto_converge
            && !caught(&self.calls, Callback::GuestCanThrottle, || guest.can_throttle())?
        {
            return Err(Usage::NoThrottle.into());
        }
        Ok(devices)
    }
}
