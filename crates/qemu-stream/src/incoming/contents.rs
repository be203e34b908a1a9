//! What a stream has contained besides RAM: at its end, or at the switch to post-copy.

use std::mem;

use super::{loaded::Loaded, precopy::Incoming};
use crate::{
    connection::Connection,
    error::Error,
    format::{DevicePart, SyncMode},
};

impl<C: Connection> Incoming<C> {
    /// What has been loaded at the switch to post-copy.
    pub(super) fn switched(&self) -> Result<Loaded, Error> {
        let devices = self.line.switched_devices()?;
        let known = &self.known;
        let Some((section, blocks)) = known.ram.clone() else {
            return Err(self.misplaced("POSTCOPY_RUN", "before the start of ram"));
        };
        Ok(Loaded {
            configuration: known.configuration.clone(),
            blocks,
            section,
            sync_mode: known.sync_mode.unwrap_or(SyncMode::Legacy),
            return_path: self.return_path,
            switchover_start: known.switchover_start,
            postcopy: true,
            footers: known.footers,
            devices,
            bytes: self.line.bytes(),
        })
    }

    pub(super) fn complete(&mut self, devices: DevicePart) -> Result<Loaded, Error> {
        // A source that has switched may return, and is asked about the same blocks.
        let known =
            if self.postcopy.early.is_some() { self.known.clone() } else { mem::take(&mut self.known) };
        let bytes = self.line.bytes();
        tracing::debug!(devices = devices.sections().len(), bytes, "stream is complete");
        let Some((section, blocks)) = known.ram else {
            return Err(self.misplaced("end of the stream", "before the start of ram"));
        };
        self.loaded = true;
        Ok(Loaded {
            configuration: known.configuration,
            blocks,
            section,
            sync_mode: known.sync_mode.unwrap_or(SyncMode::Legacy),
            return_path: self.return_path,
            switchover_start: known.switchover_start,
            postcopy: self.postcopy.run,
            footers: known.footers,
            devices,
            bytes,
        })
    }
}
