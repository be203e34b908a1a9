//! Two ends and a main stream between them: one byte per sync point, an answer at the end.

use std::{
    io::{Read, Write},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use multifd::{
    ChannelCount, ChannelStats, Error, ReceiveOptions, Receiver, Result, SendOptions, Sender, Synced,
    channel::{Connect, Context, Listen, Stop, Stream, Wake, memory},
    live::{
        DeviceInfo, DeviceSection, Guest, Main, MigrateOptions, Migration, MigrationInfo, Pass, RunState,
        Verdict,
    },
    ram::{
        BlockIndex, BlockName, DirtyLog, Mapping, Memory, NeverDirty, PageIndex, PageSize, RamBlock,
        RamBlocks,
    },
};

pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// The context of a connection that belongs to no migration.
pub(crate) fn context() -> Context {
    Context::new(&Stop::new()).connect_timeout(TIMEOUT)
}

pub(crate) fn name(text: &str) -> BlockName {
    BlockName::new(text).expect("a name")
}

/// Blocks of these lengths in new memory.
pub(crate) fn fresh(page_size: PageSize, blocks: &[(&str, u64)]) -> Arc<RamBlocks> {
    let made = blocks.iter().map(|(text, length)| {
        let memory = Memory::Mapped(Mapping::anonymous(*length).expect("memory"));
        RamBlock::new(name(text), *length, page_size, memory).expect("a block")
    });
    Arc::new(RamBlocks::new(made.collect()).expect("distinct"))
}

/// Fills a page with words that contain block, page and version.
pub(crate) fn write(blocks: &RamBlocks, block: usize, page: u64, version: u64) {
    let of = blocks.block(BlockIndex(block)).expect("there");
    let word = (block as u64) << 56 | page << 16 | version;
    let bytes: Vec<u8> =
        std::iter::repeat_n(word.to_be_bytes(), of.page_size().bytes() / 8).flatten().collect();
    of.slice(PageIndex(page), 1).expect("there").copy_from(&bytes);
}

/// The first page in which two machines differ.
pub(crate) fn difference(left: &RamBlocks, right: &RamBlocks) -> Option<String> {
    for ((index, a), (_, b)) in left.iter().zip(right.iter()) {
        let size = a.page_size().bytes();
        let (mut x, mut y) = (vec![0; size], vec![0; size]);
        for page in (0..a.pages()).map(PageIndex) {
            a.slice(page, 1).expect("there").copy_to(&mut x);
            b.slice(page, 1).expect("there").copy_to(&mut y);
            if x != y {
                return Some(format!("block {} page {page}: {:02x?} is {:02x?}", index.0, &x[..8], &y[..8]));
            }
        }
    }
    None
}

/// The source's side of the test's main stream.
pub(crate) struct TestMain {
    pub(crate) stream: Stream,
    pub(crate) bytes: u64,
    pub(crate) devices: Vec<DeviceSection>,
}

impl TestMain {
    pub(crate) fn connect(connector: &dyn Connect, stop: &Stop) -> Self {
        let context = Context::new(stop).connect_timeout(TIMEOUT);
        let link = connector.connect(&context).expect("connected");
        let mut main = Self { stream: Stream::new(link, &context), bytes: 0, devices: Vec::new() };
        main.stream.write_all(b"QEVM").expect("written");
        main
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.stream.write_all(bytes).map_err(|error| Error::io("write main", error))
    }
}

impl Main for TestMain {
    fn expect(&mut self, _devices: &[DeviceInfo]) -> Result<()> {
        Ok(())
    }
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }
    fn end_ram(&mut self, _: Option<Synced<'_>>) -> Result<()> {
        self.put(b"S")
    }
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        Some(self.stream.waker())
    }
    fn send_waker(&self) -> Option<Arc<dyn Wake>> {
        Some(self.stream.write_waker())
    }
    fn begin(&mut self, _channels: u8) -> Result<()> {
        Ok(())
    }
    fn setup(&mut self, _blocks: &RamBlocks, _: Option<Synced<'_>>) -> Result<()> {
        self.put(b"S")
    }
    fn begin_pass(&mut self, _pass: Pass) -> Result<()> {
        Ok(())
    }
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.record(b'Z', block, page)
    }
    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        self.record(b'P', block, page)?;
        self.put(bytes)
    }
    fn end_pass(&mut self, _pass: Pass, _: Option<Synced<'_>>) -> Result<()> {
        self.put(b"S")
    }
    fn switchover(&mut self) -> Result<()> {
        Ok(())
    }
    fn devices(&mut self, devices: Vec<DeviceSection>, _guest: RunState) -> Result<()> {
        self.devices = devices;
        Ok(())
    }
    fn complete(&mut self, _stop: &Stop) -> Verdict {
        let mut answer = [0];
        let read = self.put(b"E").and_then(|()| {
            let read = self.stream.read_exact(&mut answer);
            read.map_err(|error| Error::io("wait for the destination", error))
        });
        match read {
            Ok(()) if answer == *b"K" => Verdict::Taken,
            Ok(()) => Verdict::Refused(Error::other("the destination failed", "it said so")),
            Err(error) => Verdict::Refused(error),
        }
    }
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl TestMain {
    fn record(&mut self, kind: u8, block: BlockIndex, page: PageIndex) -> Result<()> {
        let mut record = vec![kind];
        record.extend((block.0 as u64).to_be_bytes());
        record.extend(page.0.to_be_bytes());
        self.put(&record)
    }
}

/// The destination: follows main until its end.
pub(crate) fn receive(
    mut receiver: Receiver,
    listener: Box<dyn Listen>,
    blocks: Arc<RamBlocks>,
) -> Result<Vec<ChannelStats>> {
    receiver.listen(listener)?;
    follow(receiver, &blocks)
}

pub(crate) fn follow(receiver: Receiver, blocks: &Arc<RamBlocks>) -> Result<Vec<ChannelStats>> {
    let mut main = receiver.wait_main()?;
    let failed = |error| receiver.stop().fail(Error::io("read main", error));
    let mut byte = [0];
    main.read_exact(&mut [0; 4]).map_err(failed)?;
    receiver.set_blocks(blocks.clone())?;
    loop {
        main.read_exact(&mut byte).map_err(failed)?;
        match byte[0] {
            b'S' => receiver.sync()?,
            b'E' => break,
            kind => {
                let (mut block, mut page) = ([0; 8], [0; 8]);
                main.read_exact(&mut block).map_err(failed)?;
                main.read_exact(&mut page).map_err(failed)?;
                let block = usize::try_from(u64::from_be_bytes(block)).expect("a block");
                let block = BlockIndex(block);
                let page = PageIndex(u64::from_be_bytes(page));
                let arrived = receiver.arrived().expect("set above");
                if kind == b'Z' {
                    arrived.clear(block, page)?;
                } else {
                    let mut bytes = vec![0; blocks.page_size().bytes()];
                    main.read_exact(&mut bytes).map_err(failed)?;
                    arrived.store(block, page, &bytes)?;
                }
            }
        }
    }
    receiver.seal()?;
    main.write_all(b"K").map_err(failed)?;
    receiver.finish()
}

/// A guest that need not be stopped.
#[derive(Default)]
pub(crate) struct StoppedGuest {
    pub(crate) resumed: bool,
}

impl Guest for StoppedGuest {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }
    fn resume(&mut self) {
        self.resumed = true;
    }
}

/// The results of both sides of a migration.
pub(crate) struct Outcome {
    pub(crate) sent: Result<MigrationInfo>,
    pub(crate) received: Result<Vec<ChannelStats>>,
}

/// Migrates `source` into `destination` over `channels` channels in memory.
pub(crate) fn migrate(
    source: &Arc<RamBlocks>,
    destination: &Arc<RamBlocks>,
    channels: u8,
    options: MigrateOptions,
    log: &mut dyn DirtyLog,
    guest: &mut dyn Guest,
) -> Outcome {
    migrate_with(
        source,
        destination,
        SendOptions::new().channels(channels),
        channels > 0,
        options,
        log,
        guest,
    )
}

/// The same, with a guest that is stopped and writes nothing.
pub(crate) fn migrate_stopped(
    source: &Arc<RamBlocks>,
    destination: &Arc<RamBlocks>,
    channels: u8,
    options: MigrateOptions,
) -> Outcome {
    migrate(source, destination, channels, options, &mut NeverDirty, &mut StoppedGuest::default())
}

/// The same, with more options.
pub(crate) fn migrate_with(
    source: &Arc<RamBlocks>,
    destination: &Arc<RamBlocks>,
    send: SendOptions,
    multifd: bool,
    options: MigrateOptions,
    log: &mut dyn DirtyLog,
    guest: &mut dyn Guest,
) -> Outcome {
    let (connector, listener) = memory::network(1 << 18);
    let ends: Ends = (Arc::new(connector), Box::new(listener));
    migrate_over(ends, source, destination, multifd.then_some(send), options, log, guest)
}

/// A connector and a listener.
pub(crate) type Ends = (Arc<dyn Connect>, Box<dyn Listen>);

/// The same, over connections of the caller's choice.
pub(crate) fn migrate_over(
    (connector, listener): Ends,
    source: &Arc<RamBlocks>,
    destination: &Arc<RamBlocks>,
    send: Option<SendOptions>,
    options: MigrateOptions,
    log: &mut dyn DirtyLog,
    guest: &mut dyn Guest,
) -> Outcome {
    let receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Auto), Stop::new());
    let destination = spawn("destination", {
        let blocks = destination.clone();
        move || receive(receiver, listener, blocks)
    });
    let stop = Stop::new();
    let mut main = TestMain::connect(&*connector, &stop);
    let sender = send.map(|send| {
        let mut sender = Sender::new(send, source.clone(), stop.clone()).expect("a sender");
        sender.set_up(connector).expect("set up");
        sender
    });
    let migration = match sender {
        Some(sender) => Migration::new(options, sender),
        None => Migration::over_main(options, source.clone(), stop),
    };
    let sent = migration.and_then(|migration| migration.run(&mut main, log, guest));
    drop(main);
    Outcome { sent, received: destination.join().expect("no panic") }
}

pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    thread::Builder::new().name(name.into()).spawn(run).expect("a thread")
}
