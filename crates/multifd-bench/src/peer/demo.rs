//! `multifd demo`: a guest that writes while it moves, and its downtime.

use std::{path::PathBuf, process::Command, time::Instant};

use serde_json::Value;

use super::{Peer, Sample, Setting};
use crate::Result;

pub(crate) struct Demo {
    pub(crate) program: PathBuf,
    pub(crate) setting: Setting,
    /// Bytes that its guest writes per second.
    pub(crate) dirty_rate: u64,
}

impl Peer for Demo {
    fn round(&mut self) -> Result<Sample> {
        let start = Instant::now();
        let mut command = Command::new(&self.program);
        command.args(["demo", "--json", &format!("--size={}", self.setting.ram)]);
        command.arg(format!("--multifd-channels={}", self.setting.channels));
        let output = command.arg(format!("--dirty-rate={}", self.dirty_rate)).output()?;
        if !output.status.success() {
            return Err(format!("the demo failed: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        let told: Value = serde_json::from_slice(&output.stdout)?;
        let seconds =
            told["total-time"].as_f64().map_or_else(|| start.elapsed().as_secs_f64(), |ms| ms / 1e3);
        Ok(Sample {
            seconds,
            bytes: self.setting.ram,
            wire: told["ram"]["transferred"].as_u64(),
            downtime: told["downtime"].as_u64(),
            ..Sample::default()
        })
    }
}
