//! The source of a migration: options that are checked before anything is connected, and one call that moves the
//! machine.

use std::{sync::Arc, time::Duration};

use multifd::{
    Error, Result, SendOptions, Sender,
    channel::{Connect, Context, Stop, Stream},
    live::{Control, Ended, Guest, MigrateOptions, Migration, MigrationInfo, Progress},
    parameters::{CONNECT_TIMEOUT, STALL_TIMEOUT},
    ram::{DirtyLog, RamBlocks},
};

use crate::{
    embedder::check_devices,
    format::{BlockList, Configuration, DevicePart, SyncMode},
    mapped_ram::StoredMachine,
    outgoing::{
        END, MainStream, Options, Outgoing, VERDICT,
        postcopy::{Moved, PostcopyOptions, PostcopySource, Requests, follow},
    },
};

/// The options of a source.
#[derive(Clone, Debug)]
#[must_use]
pub struct SourceOptions {
    stream: Options,
    /// For a machine in a file: the block list and devices of the file.
    captured: Option<(BlockList, DevicePart)>,
    channels: Option<u8>,
    send: SendOptions,
    migrate: MigrateOptions,
    connect_timeout: Duration,
    stall_timeout: Option<Duration>,
    end_timeout: Option<Duration>,
    verdict_timeout: Duration,
    postcopy: PostcopyOptions,
}

impl SourceOptions {
    /// Creates options for a running machine with this configuration, over two channels.
    pub fn new(configuration: Configuration) -> Self {
        Self::of_stream(Options::new(configuration), None)
    }

    /// Creates options for the machine in a file. Its block list and devices are sent unchanged. Over two channels.
    pub fn of_file(file: &StoredMachine) -> Self {
        let options = stream_of(file);
        let mode = file.sync_mode().or(options.chosen_sync_mode());
        let stream = options.sync_mode(mode);
        Self::of_stream(stream, Some((file.blocks().clone(), file.devices().clone())))
    }

    fn of_stream(stream: Options, captured: Option<(BlockList, DevicePart)>) -> Self {
        Self {
            stream,
            captured,
            channels: None,
            send: SendOptions::new(),
            migrate: MigrateOptions::new(),
            connect_timeout: CONNECT_TIMEOUT.default_time(),
            stall_timeout: Some(STALL_TIMEOUT.default_time()),
            end_timeout: Some(END),
            verdict_timeout: VERDICT,
            postcopy: PostcopyOptions::new(),
        }
    }

    /// The number of channels. 0 is for a destination with multifd off: all of RAM then goes over main. Default: the
    /// number of [`send`](Self::send), which is 2.
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = Some(channels);
        self
    }

    /// How the channels send: compression, UUID, zero-copy. Time limits in `options` are replaced by those set here.
    pub fn send(mut self, options: SendOptions) -> Self {
        self.send = options;
        self
    }

    /// Passes, bandwidth, downtime.
    pub fn migrate(mut self, options: MigrateOptions) -> Self {
        self.migrate = options;
        self
    }

    /// How pages are sent after a switch to post-copy: a limit for those that nobody requests, host page sizes, a connection for those
    /// that are requested. Whether and when the migration switches is in [`MigrateOptions::postcopy`]: without it, `options` have no
    /// effect. Time limits in `options` are replaced by those set here. [`preempt`](PostcopyOptions::preempt) is refused with
    /// [channels](Self::channels).
    pub fn postcopy(mut self, options: PostcopyOptions) -> Self {
        self.postcopy = options;
        self
    }

    /// The positions of the records of the channels' sync points in main. Default: as the machine type requires.
    pub fn sync_mode(mut self, mode: SyncMode) -> Self {
        self.stream = self.stream.sync_mode(Some(mode));
        self
    }

    /// Whether the migration continues without a channel whose connection breaks before the guest moves, if the destination has
    /// [it](crate::arrival::ArrivalOptions::channels_may_break) on, too. What the channel has carried since the last sync point is sent
    /// again over the others. The last channel and main may not break. Each pass then waits for a reply of the destination. It needs a
    /// return path and sync mode [round](SyncMode::Round): without them, and with any other destination, a channel that breaks ends the
    /// migration. Off by default. [`MigrationInfo::lost_channels`] has the channels that are lost.
    pub fn channels_may_break(mut self, on: bool) -> Self {
        self.stream = self.stream.channels_may_break(on);
        self
    }

    /// Migrates without a return path: see [`Options::unconfirmed`].
    pub fn unconfirmed(mut self) -> Self {
        self.stream = self.stream.unconfirmed();
        self
    }

    /// The time limit for establishing a connection, TLS handshake included. Default 30 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How long the destination may read nothing, on any connection, while there is something to send, and how long a
    /// [callback](Migration::callback_timeout) of the guest or of the dirty log may run. Default 120 s; `None` is no limit.
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

impl SourceOptions {
    /// The options of the channels.
    fn sending(&self) -> SendOptions {
        let send = self.send.clone();
        let send = self.channels.map_or(send.clone(), |channels| send.channels(channels));
        send.connect_timeout(self.connect_timeout).stall_timeout(self.stall_timeout)
    }

    /// The options of the pages after a switch.
    fn following(&self) -> PostcopyOptions {
        let options = self.postcopy.clone();
        let options = options.connect_timeout(self.connect_timeout).stall_timeout(self.stall_timeout);
        options.end_timeout(self.end_timeout)
    }

    /// Refuses what excludes post-copy.
    fn check_postcopy(&self) -> Result<()> {
        let why = if self.captured.is_some() {
            "the machine is in a file (PostcopySource::of_file starts it first)"
        } else if !self.stream.has_return_path() {
            "it needs the return path"
        } else if self.stream.ignore_shared() {
            "x-ignore-shared excludes it"
        } else if self.postcopy.has_preempt() && self.channels != Some(0) {
            "postcopy-preempt needs multifd off (SourceOptions::channels(0)); over channels, one of them has only requested pages"
        } else {
            return Ok(());
        };
        Err(multifd::error::Usage::NoPostcopy { why }.into())
    }
}

/// A machine that can be migrated: its options were checked, and nothing is connected yet.
pub struct Source {
    migration: Migration,
    options: SourceOptions,
    channels: bool,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Source {
    /// Creates the source of a machine with these blocks. `stop` cancels the migration, from any thread.
    ///
    /// # Errors
    /// If an option is out of its range, options contradict each other, or a block cannot be sent.
    pub fn new(blocks: Arc<RamBlocks>, options: SourceOptions, stop: &Stop) -> Result<Self> {
        let migrate = options.migrate.clone();
        let channels = options.channels != Some(0);
        let migration = if channels {
            Migration::new(migrate, Sender::new(options.sending(), blocks, stop.clone())?)?
        } else {
            options.send.check_without_channels()?;
            Migration::over_main(migrate, blocks, stop.clone())?
        };
        let migration = migration.callback_timeout(options.stall_timeout);
        options.stream.check().map_err(unsendable)?;
        if options.migrate.may_switch() {
            options.check_postcopy()?;
        }
        Ok(Self { migration, options, channels })
    }

    /// A handle with which other threads continue the migration after a pause before the switchover, and change limits.
    pub fn control(&self) -> Control {
        self.migration.control()
    }

    /// The numbers of the migration, for another thread to read.
    pub fn progress(&self) -> Progress {
        self.migration.progress()
    }

    /// Connects, and moves the machine, which may [switch to post-copy](MigrateOptions::postcopy). Without an error, the guest must
    /// not run here.
    ///
    /// # Errors
    /// As [`migrate`](Self::migrate). The guest is here then.
    pub fn run(
        mut self,
        connector: impl Connect + 'static,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<Moved> {
        let stop = self.migration.stop().clone();
        let prepared = self.prepare(Arc::new(connector), guest, &stop);
        let mut main = prepared.map_err(|error| stop.fail(error))?;
        match self.migration.run_postcopy(&mut main, log, guest)? {
            Ended::Completed(info) => Ok(Moved::Completed { info, postcopy: None }),
            Ended::Switched(switched) => {
                let (postcopy, send) = (self.options.following(), self.options.sending());
                follow(*switched, main, postcopy, send, log, guest)
            }
        }
    }

    /// Connects, and moves the machine. See [`Migration::run`] for the owner of the guest afterwards.
    ///
    /// # Errors
    /// Why the guest's devices are refused, before anything is connected; a connection that fails; and as
    /// [`Migration::run`]. [`Error::fault`] is the cause.
    pub fn migrate(
        mut self,
        connector: impl Connect + 'static,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<MigrationInfo> {
        let stop = self.migration.stop().clone();
        let prepared = self.prepare(Arc::new(connector), guest, &stop);
        let mut main = prepared.map_err(|error| stop.fail(error))?;
        self.migration.run(&mut main, log, guest)
    }

    fn prepare(
        &mut self,
        connector: Arc<dyn Connect>,
        guest: &dyn Guest,
        stop: &Stop,
    ) -> Result<MainStream<Stream>> {
        self.migration.check_guest(guest)?;
        let mut stream = self.options.stream.clone().multifd(self.channels);
        let may_switch = self.options.migrate.may_switch();
        if may_switch {
            let sizes = self.options.postcopy.page_sizes(stream.page_size());
            stream = stream.advise(sizes);
        }
        if self.options.captured.is_none() {
            let (page_size, section) = (stream.page_size().bytes(), stream.section);
            check_devices(&guest.devices(), page_size, section).map_err(unsendable)?;
        }
        let requests = if may_switch { self.requests(&connector, stop)? } else { None };
        let target = connector.target();
        let context = Context::new(stop).connect_timeout(self.options.connect_timeout);
        let context = context.stall_timeout(self.options.stall_timeout);
        let link = connector.connect(&context);
        let link = link.map_err(|error| Error::io(format!("connect to {target}"), error))?;
        if may_switch && !link.can_split() {
            let why = "its connection cannot send and receive at the same time: use tcp or a unix socket, or never switch";
            return Err(multifd::error::Usage::NoPostcopy { why }.into());
        }
        let outgoing = Outgoing::new(Stream::new(link, &context), stream).map_err(unsendable)?;
        if self.channels {
            self.migration.set_up(connector)?;
        }
        let main = match self.options.captured.take() {
            Some((blocks, devices)) => MainStream::of_capture(outgoing, blocks, devices, stop),
            None => MainStream::of_guest(outgoing, stop),
        };
        let main = main.end_timeout(self.options.end_timeout).verdict_timeout(self.options.verdict_timeout);
        let main = main.reply_timeout(self.options.stall_timeout);
        Ok(if may_switch { main.with_postcopy(self.options.postcopy.clone(), requests) } else { main })
    }

    /// The connection for requested pages, which is made when main has begun.
    fn requests(&self, connector: &Arc<dyn Connect>, stop: &Stop) -> Result<Option<Requests>> {
        let postcopy = self.options.following();
        if !postcopy.has_preempt() {
            return Ok(None);
        }
        if connector.is_single() {
            let why = "postcopy-preempt needs a second connection, and this address has only one";
            return Err(multifd::error::Usage::NoPostcopy { why }.into());
        }
        Ok(Some(Requests::Unconnected(connector.clone(), postcopy.context(stop))))
    }
}

impl PostcopySource {
    /// Creates the source of the machine in a file, for a guest that runs before its RAM is there. `blocks` are those that
    /// [`StoredMachine::ram_blocks`] has made. A page that differs from its digest counts as one that [cannot be
    /// read](Self::new).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_file(
        file: &StoredMachine,
        blocks: Arc<RamBlocks>,
        options: PostcopyOptions,
    ) -> Result<Self, crate::error::Usage> {
        Self::new(stream_of(file), file.blocks(), file.devices().clone(), blocks, options)
    }
}

/// The stream of the machine in a file, as it was captured.
fn stream_of(file: &StoredMachine) -> Options {
    let options = match file.configuration() {
        Some(configuration) => Options::new(configuration.clone()),
        None => Options::without_configuration(),
    };
    options
        .section(file.section())
        .footers(file.devices().has_footers())
        .switchover_start(file.switchover_start())
}

fn unsendable(error: crate::error::Usage) -> Error {
    Error::other("this machine cannot be sent", error)
}

#[cfg(test)]
mod tests {
    use std::{io, net::TcpListener, thread};

    use multifd::{
        channel::Address,
        live::{DeviceInfo, DeviceSection, PostcopyWhen, RunState},
        ram::{BlockName, Mapping, Memory, NeverDirty, PageSize, RamBlock},
    };

    use super::*;
    use crate::format::{Configuration, MachineType};

    struct Idle;

    impl Guest for Idle {
        fn devices(&self) -> Vec<DeviceInfo> {
            Vec::new()
        }
        fn run_state(&mut self) -> RunState {
            RunState::Paused
        }
        fn stop(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
            Ok(Vec::new())
        }
        fn resume(&mut self) {}
    }

    /// It takes everything, and never replies.
    #[test]
    fn destination_that_does_not_reply_between_passes_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listening");
        let address: Address =
            format!("tcp:{}", listener.local_addr().expect("an address")).parse().expect("valid");
        let takes = thread::spawn(move || {
            let all: Vec<_> = (0..3).map(|_| listener.accept().expect("a connection").0).collect();
            let reads =
                all.into_iter().map(|mut from| thread::spawn(move || io::copy(&mut from, &mut io::sink())));
            reads.collect::<Vec<_>>().into_iter().for_each(|read| drop(read.join().expect("no panic")));
        });
        let options = SourceOptions::new(Configuration::new(MachineType::new("none").expect("a name")))
            .channels(2)
            .channels_may_break(true)
            .sync_mode(SyncMode::Round)
            .stall_timeout(Some(Duration::from_millis(300)));
        let memory = Memory::Mapped(Mapping::anonymous(4096).expect("memory"));
        let block = RamBlock::new(BlockName::new("ram").expect("a name"), 4096, PageSize::KIB_4, memory);
        let blocks = Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("blocks"));
        let source = Source::new(blocks, options, &Stop::new()).expect("options that fit");
        let error = source.migrate(address, &mut NeverDirty, &mut Idle).expect_err("no reply");
        let error = multifd::error::chain(&error).to_string();
        assert!(
            error.contains("the reply to a question") && error.contains("the guest stays at the source"),
            "{error}"
        );
        takes.join().expect("no panic");
    }

    #[test]
    fn what_excludes_postcopy_is_refused_before_anything_is_connected() {
        let options = || {
            let configuration = Configuration::new(MachineType::new("none").expect("a name"));
            let migrate = MigrateOptions::new().postcopy(PostcopyWhen::Start);
            SourceOptions::new(configuration).migrate(migrate)
        };
        let refused = |options: SourceOptions| {
            let memory = Memory::Mapped(Mapping::anonymous(4096).expect("memory"));
            let name = BlockName::new("ram").expect("a name");
            let block = RamBlock::new(name, 4096, PageSize::KIB_4, memory).expect("a block");
            let blocks = RamBlocks::new(vec![block]).expect("blocks").into();
            Source::new(blocks, options, &Stop::new()).err().map(|error| error.to_string())
        };
        assert_eq!(refused(options()), None);
        assert_eq!(refused(options().channels(0).postcopy(PostcopyOptions::new().preempt(true))), None);
        for (options, why) in [
            (options().unconfirmed(), "it needs the return path"),
            (options().postcopy(PostcopyOptions::new().preempt(true)), "needs multifd off"),
            (options().channels(2).postcopy(PostcopyOptions::new().preempt(true)), "needs multifd off"),
        ] {
            let refused = refused(options).expect("refused");
            assert!(refused.contains(why), "{refused}");
        }
    }
}
