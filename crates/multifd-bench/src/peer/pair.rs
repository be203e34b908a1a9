//! A source, and a new destination for each round.
//!
//! The time runs from the word to go until the destination has told that it has loaded everything. What it has got is
//! looked at afterwards, every page of it.

use std::time::Instant;

use super::{Peer, Sample, Setting, cpu, warm::warm};
use crate::Result;

/// Has its RAM filled when it is ready, and sends it when it is told.
pub(crate) trait Source {
    /// Before each round, and not measured.
    fn ready(&mut self) -> Result<()>;
    fn go(&mut self, setting: &Setting, address: &str) -> Result<()>;
    /// Waits until it knows that the destination has everything. Says how many bytes it sent, and how much memory beyond
    /// RAM it took, if it knows.
    fn sent(&mut self) -> Result<(u64, Option<u64>)>;
    fn pid(&self) -> u32;
    /// Behind each round: what it need not keep for the next one it lets go of.
    fn done(&mut self);
}

/// Waits for one guest.
pub(crate) trait Destination {
    fn address(&self) -> String;
    /// Waits until it is loaded.
    fn loaded(&mut self) -> Result<()>;
    /// How much memory beyond RAM that took, if it knows.
    fn beyond(&mut self) -> Result<Option<u64>>;
    fn pid(&self) -> u32;
    /// Fails unless RAM holds what it should.
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
