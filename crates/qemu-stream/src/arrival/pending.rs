//! A machine that has arrived, before and after the guest is taken over.

use std::{
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use multifd::{
    Arrived, ChannelStats, Error, Receiver, Result, channel::Stream, live::RunState, ram::RamBlocks,
    wire::VmUuid,
};

use crate::{
    format::DeviceSection,
    incoming::{Incoming, Loaded, MainPages, Outcome},
};

/// RAM and devices have arrived; the source still owns the guest. When dropped, it informs the source to keep the
/// guest.
#[must_use = "if it is dropped, the guest stays at the source"]
pub struct Pending {
    // The order of the fields matters: the source is informed of the failure before its connections end.
    pub(super) incoming: Incoming<Stream>,
    pub(super) receiver: Receiver,
    pub(super) loaded: Loaded,
    pub(super) blocks: Arc<RamBlocks>,
    pub(super) main_pages: MainPages,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the state of the devices, which may be large and belongs to the guest.
        f.debug_struct("Pending")
            .field("blocks", &self.blocks)
            .field("main_pages", &self.main_pages)
            .finish_non_exhaustive()
    }
}

impl Pending {
    /// The machine's blocks, with all of RAM in them.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// What arrived besides RAM.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// The device with this name and instance: its section and its state.
    pub fn device(&self, name: &str, instance: u32) -> Option<(&DeviceSection, &[u8])> {
        self.loaded.device(name, instance)
    }

    /// The pages of the blocks that have arrived: all, except what the source [may leave
    /// out](super::ArrivalOptions::left_out).
    pub fn arrived(&self) -> &Arrived {
        self.receiver.arrived().expect("the blocks were announced")
    }

    /// The counters of each channel.
    pub fn channels(&self) -> Vec<ChannelStats> {
        self.receiver.stats()
    }

    /// The UUID that the channels sent: nil for a machine without one, `None` if there are no channels.
    pub fn uuid(&self) -> Option<VmUuid> {
        self.receiver.uuid()
    }

    /// The pages that arrived over main.
    pub fn main_pages(&self) -> MainPages {
        self.main_pages
    }

    /// The number of bytes that arrived over main.
    pub fn main_bytes(&self) -> u64 {
        self.incoming.bytes()
    }

    /// Checks a source without return path, which has dropped its guest already: reads what the connection itself can
    /// still report. For an `exec:` address, this is the exit status of the ended command. With a return path it does
    /// nothing.
    ///
    /// # Errors
    /// If the source is known to have failed.
    pub fn check_source(&mut self) -> Result<()> {
        if self.loaded.return_path {
            return Ok(());
        }
        let ended = self.incoming.connection().finish();
        ended.map_err(|error| Error::io("wait for the end of the source", error))
    }

    /// Informs the source that its guest continues there, because of `error`. A source of this library
    /// [reports](super::ArrivalOptions::send_reason) its text. Returns `error`.
    pub fn refuse(self, error: Error) -> Error {
        let Self { mut incoming, receiver, .. } = self;
        incoming.set_reason(receiver.stop().error().as_ref().unwrap_or(&error));
        // Before the stop, which shuts connections down. The receiver cancels if it has not failed by then.
        drop(incoming);
        receiver.stop().fail(error)
    }

    /// Takes the guest over: confirms to the source that everything has arrived. After `Ok` the guest is ours.
    ///
    /// # Errors
    /// If the source has taken its guest back, or could not be informed: the guest must not run here.
    pub fn confirm(self) -> Result<Confirmed> {
        let Self { mut incoming, receiver, loaded, blocks, .. } = self;
        let stop = receiver.stop().clone();
        let told = stop.check().inspect_err(|error| incoming.set_reason(error)).and_then(|()| {
            let told = incoming.finish(Outcome::Loaded);
            told.map_err(|error| error.while_doing("cannot confirm the migration to the source"))
        });
        let main = told.map_err(|error| stop.fail(error))?;
        Ok(Confirmed { loaded, blocks, receiver, main })
    }
}

/// The guest is ours.
#[must_use = "its guest runs nowhere else"]
pub struct Confirmed {
    loaded: Loaded,
    blocks: Arc<RamBlocks>,
    receiver: Receiver,
    main: Stream,
}

impl std::fmt::Debug for Confirmed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the state of the devices, which may be large and belongs to the guest.
        f.debug_struct("Confirmed")
            .field("blocks", &self.blocks)
            .field("main", &self.main)
            .finish_non_exhaustive()
    }
}

impl Confirmed {
    /// The machine's blocks.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// What arrived besides RAM.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Whether the guest must run: a guest that was paused at the source stays paused. If the source did not send the
    /// state, the guest counts as running.
    pub fn run_state(&self) -> RunState {
        self.loaded.run_state().unwrap_or(RunState::Running)
    }

    /// Waits until the source closes main, for at most `limit`. A source that had ended before it got the confirmation
    /// breaks the connection instead. Without a return path there is no wait.
    ///
    /// # Errors
    /// If the connection is broken: the source may not know that the guest is here.
    pub fn wait_closed(&mut self, limit: Duration) -> Result<()> {
        if !self.loaded.return_path {
            return Ok(());
        }
        let read = self.main.set_read_timeout(Some(limit)).and_then(|()| self.main.read(&mut [0]));
        match read {
            // It has closed the connection normally, or leaves it open.
            Ok(_) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Ok(())
            }
            Err(error) => Err(Error::io("the connection failed after the confirmation was sent", error)),
        }
    }

    /// Closes the channels, after the guest was started. This may take as long as the source leaves them open, by
    /// default at most 5 s. Returns the counters of each channel. Errors here do not affect the guest; they go to the
    /// log.
    pub fn finish(self) -> Vec<ChannelStats> {
        let counters = self.receiver.counters();
        let stats = self.receiver.finish().unwrap_or_else(|error| {
            tracing::debug!(%error, "the channels did not end cleanly");
            counters.stats()
        });
        drop(self.main);
        stats
    }
}
