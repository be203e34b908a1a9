//! Receives a machine: from a listener to a guest that may run. Each step is a type.
//!
//! ```text
//! Listening ── accept ──▶ Arrival ── load(make) ──▶ Pending ── confirm ──▶ Confirmed
//!                         a source       RAM and devices are here,       the guest is ours
//!                         is here        the guest is the source's
//! ```
//!
//! After any failure before [`Pending::confirm`] has returned (an error, a panic, a drop), the source keeps the guest
//! and is informed. After it the guest is only ours.

use std::{
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use multifd::{
    Arrived, ChannelStats, Error, Fault, ReceiveOptions, Receiver, RecvCounters, Result,
    channel::{Listen, Stop, Stream},
    live::RunState,
    ram::RamBlocks,
    wire::VmUuid,
};

use crate::{
    format::{BlockList, Configuration, DeviceSection},
    incoming::{
        CHANNELS_END, Expected, Incoming, LeftOut, Loaded, Loader, MainPages, Outcome, SILENCE, STALL,
    },
};

/// The options of a destination.
#[derive(Clone, Debug)]
#[must_use]
pub struct ArrivalOptions {
    expected: Expected,
    left_out: LeftOut,
    receive: ReceiveOptions,
    stall_timeout: Option<Duration>,
    silence: Duration,
    switchover_ack: bool,
    suppress_vmdesc: bool,
}

impl ArrivalOptions {
    /// Accepts an `expected` machine, over as many channels as the source has.
    pub fn new(expected: Expected) -> Self {
        Self {
            expected,
            left_out: LeftOut::default(),
            receive: ReceiveOptions::new(),
            stall_timeout: Some(STALL),
            silence: SILENCE,
            switchover_ack: false,
            suppress_vmdesc: false,
        }
    }

    /// What the source may leave out of RAM. Default: [`LeftOut::Ignored`].
    pub fn left_out(mut self, left_out: LeftOut) -> Self {
        self.left_out = left_out;
        self
    }

    /// How the channels are received. `stall_timeout` in `options` is replaced by the one set here.
    pub fn receive(mut self, options: ReceiveOptions) -> Self {
        self.receive = options;
        self
    }

    /// How long the source may send nothing, on any connection, while something is expected: see
    /// [`Incoming::stall_timeout`]. Default 120 s; `None` is no limit.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// See [`Incoming::silence`]. Default 10 s.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit;
        self
    }

    /// See [`Incoming::switchover_ack`]. Default off.
    pub fn switchover_ack(mut self, on: bool) -> Self {
        self.switchover_ack = on;
        self
    }

    /// See [`Incoming::suppress_vmdesc`]. Default off.
    pub fn suppress_vmdesc(mut self, on: bool) -> Self {
        self.suppress_vmdesc = on;
        self
    }
}

/// A destination that listens; no source has connected yet.
pub struct Listening {
    receiver: Receiver,
    options: ArrivalOptions,
}

impl std::fmt::Debug for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listening").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Listening {
    /// Waits for a source, without limit: a destination may wait for days.
    ///
    /// # Errors
    /// If it is stopped, or the listener fails.
    pub fn accept(self) -> Result<Arrival> {
        let Self { receiver, options } = self;
        let main = receiver.wait_main()?;
        let peer = main.peer();
        let incoming = Incoming::new(main)
            .stopping(receiver.stop())
            .stall_timeout(options.stall_timeout)
            .silence(options.silence)
            .switchover_ack(options.switchover_ack)
            .suppress_vmdesc(options.suppress_vmdesc);
        Ok(Arrival { incoming, receiver, options, peer })
    }
}

/// A source has connected; nothing was read from it yet.
pub struct Arrival {
    // The order of the fields matters: the source is informed of the failure before its connections end.
    incoming: Incoming<Stream>,
    receiver: Receiver,
    options: ArrivalOptions,
    peer: String,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival")
            .field("peer", &self.peer)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Arrival {
    /// Listens for connections on `listener`. `stop` ends the wait for a source, and everything after it.
    ///
    /// # Errors
    /// If `listener` accepts only one connection and channels are expected; if the system cannot start a thread.
    pub fn listen(listener: Box<dyn Listen>, options: ArrivalOptions, stop: &Stop) -> Result<Listening> {
        let receive = options.receive.clone().stall_timeout(options.stall_timeout);
        let mut receiver = Receiver::new(receive, stop.clone());
        receiver.listen(listener)?;
        Ok(Listening { receiver, options })
    }

    /// The source, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The counters of the channels, for another thread to read.
    pub fn counters(&self) -> RecvCounters {
        self.receiver.counters()
    }

    /// Receives RAM and devices. `make` returns the machine's blocks after the source has announced its configuration
    /// and block list, and may refuse them. The blocks are matched with the source's by name; each must have the
    /// announced length.
    ///
    /// # Errors
    /// The first error: of the source, of a connection, of `make`, or of incomplete RAM. The source was informed, and
    /// its guest continues there.
    pub fn load(
        self,
        make: impl FnMut(Option<&Configuration>, &BlockList) -> Result<RamBlocks>,
    ) -> Result<Pending> {
        let Self { mut incoming, receiver, options, .. } = self;
        let mut loader = Loader::new(&receiver, options.expected, make).left_out(options.left_out);
        let loaded = incoming.run(&mut loader);
        let whole = loaded.map_err(|error| error.while_doing("cannot receive the guest"));
        match whole.and_then(|loaded| {
            let main_pages = loader.main_pages();
            let blocks = loader.finish(&loaded)?;
            Ok((loaded, blocks, main_pages))
        }) {
            Ok((loaded, blocks, main_pages)) => {
                Ok(Pending { incoming, receiver, loaded, blocks, main_pages })
            }
            Err(error) => {
                // Dropped first, because a stop shuts connections down.
                drop(incoming);
                Err(match error.fault() {
                    Fault::Connection => receiver.fail_with_source(error, CHANNELS_END),
                    _ => receiver.stop().fail(error),
                })
            }
        }
    }
}

/// RAM and devices have arrived; the source still owns the guest. When dropped, it informs the source to keep the
/// guest.
#[must_use = "if it is dropped, the guest stays at the source"]
pub struct Pending {
    // The order of the fields matters: the source is informed of the failure before its connections end.
    incoming: Incoming<Stream>,
    receiver: Receiver,
    loaded: Loaded,
    blocks: Arc<RamBlocks>,
    main_pages: MainPages,
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
    /// The machine's blocks, as returned by `make`, with all of RAM in them.
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
    /// out](ArrivalOptions::left_out).
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

    /// Informs the source that its guest continues there, because of `error`. Returns `error`.
    pub fn refuse(self, error: Error) -> Error {
        let Self { incoming, receiver, .. } = self;
        // Before the stop, which shuts connections down. The receiver cancels if it has not failed by then.
        drop(incoming);
        receiver.stop().fail(error)
    }

    /// Takes the guest over: confirms to the source that everything has arrived. After `Ok` the guest is ours.
    ///
    /// # Errors
    /// If the source has taken its guest back, or could not be informed: the guest must not run here.
    pub fn confirm(self) -> Result<Confirmed> {
        let Self { incoming, receiver, loaded, blocks, .. } = self;
        let stop = receiver.stop().clone();
        let told = stop.check().and_then(|()| {
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
