//! The options of a migration in one pass, and a guest that does not run.

use std::{io, time::Duration};

use multifd::live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, RunState, ZeroPageDetection};

/// All of RAM at once, regardless of the downtime.
pub(crate) fn one_pass() -> MigrateOptions {
    MigrateOptions::new()
        .zero_page_detection(ZeroPageDetection::Multifd)
        .downtime_limit(Duration::from_secs(2000))
}

/// A guest that does not run.
pub(crate) struct Stopped;

impl Guest for Stopped {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }
    fn resume(&mut self) {}
}
