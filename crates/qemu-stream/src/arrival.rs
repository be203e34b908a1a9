//! A machine that arrives: from a listener to a guest that may run, step by step, each a type.
//!
//! ```text
//! Listening ── accept ──▶ Arrival ── load(make) ──▶ Pending ── confirm ──▶ Confirmed
//!                         a source       RAM and devices are here,       the guest is ours
//!                         is here        the guest is the source's
//! ```
//!
//! Whatever goes wrong before [`Pending::confirm`] has returned, the guest is the source's, and the source is told: an error,
//! a panic, a drop. Behind it the guest is ours alone.

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

/// What a destination takes, and how.
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
    /// Takes an `expected` machine over channels as the source has them.
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

    /// How the channels are received. Their `stall_timeout` is the one given here.
    pub fn receive(mut self, options: ReceiveOptions) -> Self {
        self.receive = options;
        self
    }

    /// How long the source may send nothing, on any connection, where something must come: see
    /// [`Incoming::stall_timeout`]. Default 120 s; `None` is for ever.
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

/// A destination that listens, and no source has connected yet.
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

/// A source has connected, and nothing was taken from it yet.
pub struct Arrival {
    // In this order: the source hears that it failed before its connections end.
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
    /// Takes connections from `listener`. `stop` ends the wait for a source, and everything behind it.
    ///
    /// # Errors
    /// If `listener` takes a single connection and channels are expected; if the system refuses a thread.
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

    /// What the channels bring, for another thread to read.
    pub fn counters(&self) -> RecvCounters {
        self.receiver.counters()
    }

    /// Takes in RAM and devices. `make` gives the machine's blocks when the source has announced what it has, and may refuse
    /// it; they are matched with the source's by name, and each needs the announced length.
    ///
    /// # Errors
    /// The first error: of the source, of a connection, of `make`, of RAM that is not whole. The source has been told, and its
    /// guest goes on there.
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
                // First: a stop shuts connections down.
                drop(incoming);
                Err(match error.fault() {
                    Fault::Connection => receiver.fail_with_source(error, CHANNELS_END),
                    _ => receiver.stop().fail(error),
                })
            }
        }
    }
}

/// RAM and devices are here, and the guest is the source's. Dropped, it tells the source to keep it.
#[must_use = "dropped, the guest stays at the source"]
pub struct Pending {
    // In this order: the source hears that it failed before its connections end.
    incoming: Incoming<Stream>,
    receiver: Receiver,
    loaded: Loaded,
    blocks: Arc<RamBlocks>,
    main_pages: MainPages,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the state of the devices, which may be large and is the guest's.
        f.debug_struct("Pending")
            .field("blocks", &self.blocks)
            .field("main_pages", &self.main_pages)
            .finish_non_exhaustive()
    }
}

impl Pending {
    /// The machine's blocks, as `make` has given them, with all of RAM in them.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// What came beside RAM.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// The device of this name and instance: its section and its state.
    pub fn device(&self, name: &str, instance: u32) -> Option<(&DeviceSection, &[u8])> {
        self.loaded.device(name, instance)
    }

    /// Which pages of the blocks have come: all of them, but for what the source [may leave out](ArrivalOptions::left_out).
    pub fn arrived(&self) -> &Arrived {
        self.receiver.arrived().expect("the blocks were announced")
    }

    /// What each channel has brought.
    pub fn channels(&self) -> Vec<ChannelStats> {
        self.receiver.stats()
    }

    /// The UUID that the channels name: nil for a machine without one, `None` if there are no channels.
    pub fn uuid(&self) -> Option<VmUuid> {
        self.receiver.uuid()
    }

    /// The pages that came over main.
    pub fn main_pages(&self) -> MainPages {
        self.main_pages
    }

    /// Bytes that came over main.
    pub fn main_bytes(&self) -> u64 {
        self.incoming.bytes()
    }

    /// Of a source without return path, which has forgotten its guest already: looks at what the connection itself can still
    /// report. The command of an `exec:` address has ended, and this is its exit status. Nothing is done with a return path.
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

    /// Tells the source that its guest goes on there, because of `error`, which is given back.
    pub fn refuse(self, error: Error) -> Error {
        let Self { incoming, receiver, .. } = self;
        // Before the stop, which shuts connections down; the receiver cancels what has not failed by then.
        drop(incoming);
        receiver.stop().fail(error)
    }

    /// Takes the guest over: tells the source that all is here. From its return on the guest is ours.
    ///
    /// # Errors
    /// If the source has taken its guest back, or could not be told: the guest must not run here.
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
        // Without the state of the devices, which may be large and is the guest's.
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

    /// What came beside RAM.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Whether the guest is to run: a guest that was paused at the source stays paused. One whose source does not say ran.
    pub fn run_state(&self) -> RunState {
        self.loaded.run_state().unwrap_or(RunState::Running)
    }

    /// Waits until the source closes main, for `limit` at the most: one that had gone before it was told breaks the connection
    /// instead. Nothing is waited for without a return path.
    ///
    /// # Errors
    /// If the connection is broken: the source may not know that the guest is here.
    pub fn wait_closed(&mut self, limit: Duration) -> Result<()> {
        if !self.loaded.return_path {
            return Ok(());
        }
        let read = self.main.set_read_timeout(Some(limit)).and_then(|()| self.main.read(&mut [0]));
        match read {
            // It has closed in order, or leaves the connection open.
            Ok(_) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Ok(())
            }
            Err(error) => Err(Error::io("the connection broke after the confirmation was sent", error)),
        }
    }

    /// Takes leave of the source's channels, after the guest has been let go: that may take as long as the source leaves
    /// them open, 5 s at the most by default. Says what each channel has brought. Nothing that goes wrong here matters to the
    /// guest; it is in the log.
    pub fn finish(self) -> Vec<ChannelStats> {
        let counters = self.receiver.counters();
        let stats = self.receiver.finish().unwrap_or_else(|error| {
            tracing::debug!(%error, "the channels did not end in order");
            counters.stats()
        });
        drop(self.main);
        stats
    }
}
