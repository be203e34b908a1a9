//! A source, and a new destination for each round.
//!
//! The time is measured from the start command until the destination reports that it has loaded everything. Its
//! contents are checked afterwards, every page of them.

use std::time::Instant;

use super::{Peer, Sample, Setting, cpu, warm::warm};
use crate::Result;

/// Fills its RAM when `ready` is called, and sends it on command.
pub(crate) trait Source {
    /// Called before each round, and not measured.
    fn ready(&mut self) -> Result<()>;
    fn go(&mut self, setting: &Setting, address: &str) -> Result<()>;
    /// Waits until it knows that the destination has everything. Returns how many bytes it sent and, if known, how much
    /// memory beyond RAM it used.
    fn sent(&mut self) -> Result<(u64, Option<u64>)>;
    fn pid(&self) -> u32;
    /// Called after each round: releases what the next round does not need.
    fn done(&mut self);
}

/// Waits for one guest.
pub(crate) trait Destination {
    fn address(&self) -> String;
    /// Waits until it is loaded.
    fn loaded(&mut self) -> Result<()>;
    /// The memory beyond RAM that it used, if known.
    fn beyond(&mut self) -> Result<Option<u64>>;
    fn pid(&self) -> u32;
    /// Fails unless RAM has the expected contents.
    fn check(&mut self) -> Result<()>;
}

/// Makes the destination of a round.
pub(crate) type Make<'a> = Box<dyn Fn() -> Result<Box<dyn Destination>> + 'a>;

pub(crate) struct Pair<'a> {
    pub(crate) setting: Setting,
    pub(crate) source: Box<dyn Source + 'a>,
    pub(crate) make: Make<'a>,
}

impl Peer for Pair<'_> {
    fn round(&mut self) -> Result<Sample> {
        self.source.ready()?;
        let mut destination = (self.make)()?;
        let pids = [self.source.pid(), destination.pid()];
        warm(&self.setting)?;
        let before = [cpu(pids[0])?, cpu(pids[1])?];
        let start = Instant::now();
        self.source.go(&self.setting, &destination.address())?;
        destination.loaded()?;
        let seconds = start.elapsed().as_secs_f64();
        let (wire, beyond_source) = self.source.sent()?;
        let used = [cpu(pids[0])? - before[0], cpu(pids[1])? - before[1]];
        let beyond = destination.beyond()?;
        self.source.done();
        destination.check()?;
        Ok(Sample {
            seconds,
            bytes: self.setting.ram,
            cpu: Some(used),
            wire: Some(wire),
            beyond: beyond_source.zip(beyond).map(|(source, destination)| [source, destination]),
            downtime: None,
        })
    }
}
