//! Makes a mapped-ram file of the recording of a migration.
//!
//! ```text
//! Recording ─▶ Played: Listen ─▶ Arrival ─ blocks in the scratch file ─▶ Pending ─▶ head, bitmaps, devices ─▶ StoredMachine
//! ```
//!
//! The arrival is that of every destination, so a recording is checked as a migration is. Its threads end with it.

use std::{
    fs::File,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use multifd::{
    Error, ReceiveOptions, Result,
    channel::Stop,
    ram::{RamBlocks, with_file_size_errors},
};

use crate::{
    arrival::{Arrival, ArrivalOptions, Pending},
    format::{BlockList, Configuration, SectionId},
    incoming::{Expected, LeftOut},
    mapped_ram::{Layout, Shape, StoredMachine, Tail},
    recording::{Bytes, Played, Recording},
};

/// Receives a recorded migration again, to have the machine that its destination had.
#[derive(Debug)]
#[must_use]
pub struct Receive<B> {
    recording: Arc<Recording<B>>,
}

impl<B: Bytes + 'static> Receive<B> {
    /// Of this recording.
    pub fn new(recording: Recording<B>) -> Self {
        Self { recording: Arc::new(recording) }
    }

    /// Writes the machine as a mapped-ram file to `scratch`, an empty file that is open for reading and writing, and opens it there.
    /// `read` counts the bytes that are received.
    ///
    /// # Errors
    /// As those of a destination; if the recording is encrypted, or has not one main connection; if the scratch file cannot be
    /// written; if `stop` has cancelled it.
    pub fn run(self, scratch: &Arc<File>, read: &Arc<AtomicU64>, stop: &Stop) -> Result<StoredMachine> {
        let played = Played::new(self.recording, read.clone())
            .map_err(|error| Error::other("cannot read the recording", error))?;
        // A stop of its own, because the end of the arrival stops everything that belongs to it.
        let own = Stop::new();
        let listening = Arrival::listen(played, options(), &own)?;
        let _watch = stop.watch_failure(Arc::new(Cancel(own.clone())));
        let arrival = listening.accept()?;
        let pending = arrival.load(|configuration, list| blocks(scratch, configuration, list))?;
        write(&pending, scratch)?;
        stop.check()?;
        // Nobody waits for a confirmation: the recorded source has gone.
        drop(pending);
        let opened = scratch.try_clone().map_err(|error| Error::io("open the scratch file again", error))?;
        StoredMachine::of_scratch(opened, true)
            .map_err(|error| Error::other("cannot read the machine", error))
    }
}

/// Ends an arrival when another stop is cancelled.
struct Cancel(Stop);

impl multifd::channel::Wake for Cancel {
    fn wake(&self) {
        self.0.cancel();
    }
}

fn options() -> ArrivalOptions {
    ArrivalOptions::new(Expected::AnyMachine)
        .receive(ReceiveOptions::new().accept_timeout(Some(LIMIT)))
        .left_out(LeftOut::SharedBlocks)
        .stall_timeout(Some(LIMIT))
        .pause_timeout(Some(LIMIT))
        .postcopy(true)
}

/// The machine's blocks, each at its place in the scratch file.
fn blocks(scratch: &Arc<File>, configuration: Option<&Configuration>, list: &BlockList) -> Result<RamBlocks> {
    let (section, ignored) = (SectionId(1), &[][..]);
    let shape = Shape { configuration, section, offset: 0, footers: true, ignored, sync_mode: None };
    let layout = Layout::of(&shape, list)
        .map_err(|error| Error::other("cannot compute the layout of the scratch file", error))?;
    with_file_size_errors(|| scratch.set_len(layout.tail_offset()))
        .map_err(|error| Error::io("extend the scratch file", error))?;
    layout.ram_blocks(scratch, None)
}

/// Writes everything but the pages.
fn write(pending: &Pending, scratch: &File) -> Result<()> {
    let loaded = pending.loaded();
    let failed = |error| Error::other("cannot write the scratch file", error);
    let (layout, _) = Layout::of_arrived(loaded, pending.arrived(), pending.uuid(), 0).map_err(failed)?;
    let tail =
        Tail { switchover_start: loaded.switchover_start, devices: &loaded.devices, about: None, base: None };
    layout.write_around(scratch, pending.blocks(), &tail).map(drop).map_err(failed)
}

/// A recording never stalls: what is waited for longer than this is not in it. A slow disk may take its time for the scratch file.
const LIMIT: Duration = Duration::from_secs(60);
