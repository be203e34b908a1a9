//! A machine that leaves: what is chosen, checked before anything is connected, and one call that moves it.
//!
//! ```text
//! DepartureOptions ─▶ Departure::new ─ checked ─▶ run ─ connect main ─ connect channels ─ Migration
//! ```

use std::{sync::Arc, time::Duration};

use multifd::{
    Error, Result, SendOptions, Sender,
    channel::{Connect, Stop, Stream},
    live::{Control, Guest, MigrateOptions, Migration, MigrationInfo, Progress},
    ram::{DirtyLog, RamBlocks},
};

use crate::{
    embedder::check_devices,
    format::Configuration,
    outgoing::{END, MainStream, Options, Outgoing, VERDICT},
};

/// How a machine leaves.
#[derive(Clone, Debug)]
#[must_use]
pub struct DepartureOptions {
    stream: Options,
    send: Option<SendOptions>,
    migrate: MigrateOptions,
    connect_timeout: Duration,
    stall_timeout: Option<Duration>,
    end_timeout: Option<Duration>,
    verdict_timeout: Duration,
}

impl DepartureOptions {
    /// A machine of this configuration, over two channels, as the default options have it.
    pub fn new(configuration: Configuration) -> Self {
        let send = SendOptions::new();
        Self {
            stream: Options::new(configuration),
            connect_timeout: Duration::from_secs(30),
            stall_timeout: Some(Duration::from_secs(120)),
            end_timeout: Some(END),
            verdict_timeout: VERDICT,
            migrate: MigrateOptions::new(),
            send: Some(send),
        }
    }

    /// How the channels send. `None`: without channels, for a destination with multifd off.
    pub fn send(mut self, options: Option<SendOptions>) -> Self {
        self.send = options;
        self
    }

    /// Passes, bandwidth, downtime.
    pub fn migrate(mut self, options: MigrateOptions) -> Self {
        self.migrate = options;
        self
    }

    /// How long main may take to connect. Default 30 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How long the destination may take nothing in, on any connection, while main has something for it. Default 120 s;
    /// `None` is for ever.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// See [`MainStream::end_timeout`]. Default 600 s.
    pub fn end_timeout(mut self, limit: Option<Duration>) -> Self {
        self.end_timeout = limit;
        self
    }

    /// See [`MainStream::verdict_timeout`]. Default 10 s.
    pub fn verdict_timeout(mut self, limit: Duration) -> Self {
        self.verdict_timeout = limit;
        self
    }
}

/// A machine that is about to leave: its options have been checked, and nothing is connected yet.
pub struct Departure {
    migration: Migration,
    options: DepartureOptions,
    channels: bool,
}

impl Departure {
    /// The departure of a machine with these blocks. `stop` cancels it, from any thread.
    ///
    /// # Errors
    /// If an option is out of its range, options contradict each other, or a block cannot be sent.
    pub fn new(blocks: Arc<RamBlocks>, options: DepartureOptions, stop: &Stop) -> Result<Self> {
        let migrate = options.migrate.clone();
        let (migration, channels) = match &options.send {
            Some(send) => (Migration::new(migrate, Sender::new(send.clone(), blocks, stop.clone())?)?, true),
            None => (Migration::over_main(migrate, blocks, stop.clone())?, false),
        };
        options.stream.check().map_err(unsendable)?;
        Ok(Self { migration, options, channels })
    }

    /// What tells it, from any thread, to go on where it pauses before the switchover, and what else can change meanwhile.
    pub fn control(&self) -> Control {
        self.migration.control()
    }

    /// Its numbers, for another thread to read.
    pub fn progress(&self) -> Progress {
        self.migration.progress()
    }

    /// Connects, and moves the machine. See [`Migration::run`] for who has the guest afterwards.
    ///
    /// # Errors
    /// What the guest's devices are refused for, before anything is connected; a connection that fails; and as
    /// [`Migration::run`].
    pub fn run(
        mut self,
        connector: &Arc<dyn Connect>,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<MigrationInfo> {
        let stop = self.migration.stop().clone();
        let prepared = self.prepare(connector, guest, &stop);
        let mut main = prepared.map_err(|error| stop.fail(error))?;
        self.migration.run(&mut main, log, guest)
    }

    fn prepare(
        &mut self,
        connector: &Arc<dyn Connect>,
        guest: &dyn Guest,
        stop: &Stop,
    ) -> Result<MainStream<Stream>> {
        self.migration.check_guest(guest)?;
        let stream = self.options.stream.clone().multifd(self.channels);
        let (page_size, section) = (stream.page_size().bytes(), stream.section);
        check_devices(&guest.devices(), page_size, section).map_err(unsendable)?;
        let target = connector.target();
        let link = connector.connect(stop, self.options.connect_timeout);
        let link = link.map_err(|error| Error::io(format!("connect to {target}"), error))?;
        let main = Stream::new(link).attended(stop.attention(self.options.stall_timeout));
        let main = main.map_err(|error| Error::io(format!("set a time limit for {target}"), error))?;
        let outgoing = Outgoing::new(main, stream).map_err(unsendable)?;
        if self.channels {
            self.migration.set_up(connector.clone())?;
        }
        let main = MainStream::of_guest(outgoing, stop).end_timeout(self.options.end_timeout);
        Ok(main.verdict_timeout(self.options.verdict_timeout))
    }
}

fn unsendable(error: crate::error::CallerMistake) -> Error {
    Error::other("this machine cannot be sent", error)
}
