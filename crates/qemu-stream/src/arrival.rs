//! A machine that arrives: from a listener to a guest that may run, step by step, each a type.
//!
//! ```text
//! Listener ─▶ Arrival ── load(make) ──▶ Pending ── confirm ──▶ Confirmed
//!             a source       RAM and devices are here,       the guest is ours
//!             has come       the guest is the source's
//! ```
//!
//! Whatever goes wrong before [`Pending::confirm`] has returned, the guest is the source's, and the source is told: an error,
//! a panic, a drop. Behind it the guest is ours alone.

use std::sync::Arc;

use multifd::{
    ChannelStats, Error, ReceiveOptions, Receiver, RecvCounters, Result,
    channel::{Listen, Stop, Stream},
    live::RunState,
    ram::RamBlocks,
};

use crate::{
    format::{BlockList, Configuration, DeviceSection},
    incoming::{Expected, Incoming, LeftOut, Loaded, Loader, Outcome},
};

/// What a destination takes, and how.
#[derive(Clone, Debug)]
#[must_use]
pub struct ArrivalOptions {
    expected: Expected,
    left_out: LeftOut,
    receive: ReceiveOptions,
}

impl ArrivalOptions {
    /// Takes an `expected` machine over channels as the source has them.
    pub fn new(expected: Expected) -> Self {
        Self { expected, left_out: LeftOut::default(), receive: ReceiveOptions::new() }
    }

    /// What the source may leave out of RAM. Default: [`LeftOut::Ignored`].
    pub fn left_out(mut self, left_out: LeftOut) -> Self {
        self.left_out = left_out;
        self
    }

    /// How the channels are received.
    pub fn receive(mut self, options: ReceiveOptions) -> Self {
        self.receive = options;
        self
    }
}

/// A source has come, and nothing was taken from it yet.
pub struct Arrival {
    // In this order: the source hears that it failed before its connections end.
    incoming: Incoming<Stream>,
    receiver: Receiver,
    options: ArrivalOptions,
    peer: String,
}

impl Arrival {
    /// Waits for a source at `listener`, without limit: a destination may wait for days. `stop` ends the wait, and everything
    /// behind it.
    ///
    /// # Errors
    /// If it is stopped, or the listener fails.
    pub fn accept(listener: Box<dyn Listen>, options: ArrivalOptions, stop: &Stop) -> Result<Self> {
        let mut receiver = Receiver::new(options.receive.clone(), stop.clone());
        receiver.listen(listener)?;
        let main = receiver.wait_main()?;
        let peer = main.peer();
        Ok(Self { incoming: Incoming::new(main).stopping(stop), receiver, options, peer })
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
        let whole = loaded.map_err(|error| Error::other("the migration broke off", error));
        match whole.and_then(|loaded| {
            let blocks = loader.finish(&loaded)?;
            Ok((loaded, blocks))
        }) {
            Ok((loaded, blocks)) => Ok(Pending { incoming, receiver, loaded, blocks }),
            Err(error) => {
                // First: a stop shuts connections down.
                drop(incoming);
                Err(receiver.stop().fail(error))
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

    /// Tells the source that its guest goes on there, because of `error`, which is given back.
    pub fn refuse(self, error: Error) -> Error {
        let stop = self.receiver.stop().clone();
        drop(self);
        stop.fail(error)
    }

    /// Takes the guest over: tells the source that all is here. From its return on the guest is ours.
    ///
    /// # Errors
    /// If the source has taken its guest back, or could not be told: the guest must not run here.
    pub fn confirm(self) -> Result<Confirmed> {
        let Self { incoming, receiver, loaded, blocks } = self;
        let stop = receiver.stop().clone();
        let told = stop.check().and_then(|()| {
            let told = incoming.finish(Outcome::Loaded);
            told.map_err(|error| Error::other("take the guest over from the source", error))
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
