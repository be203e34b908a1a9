//! Sends all of RAM twice over real sockets of this machine, in one process.
//!
//! The log reports every page dirty once more after the first pass, and the destination answers at every sync point. So
//! between the two answers of the passes each thread is running, each buffer exists, and RAM moves once.

use std::{
    io::{Read, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use multifd::{
    ChannelStats, Method, ReceiveOptions, Receiver, Result, SendOptions, Sender, Synced,
    channel::{Address, Connect, Context, Listen, Listener, Stop, Stream, Wake},
    error::Error,
    live::{
        DeviceInfo, DeviceSection, Guest, Main, MigrateOptions, Migration, Pass, RunState, Verdict,
        ZeroPageDetection,
    },
    ram::{
        BlockIndex, BlockName, DirtyLog, DirtyPages, Mapping, Memory, PageBitmap, PageIndex, PageSize,
        RamBlock, RamBlocks,
    },
};

pub(crate) const PAGE_SIZE: PageSize = PageSize::KIB_4;
/// Pages of RAM.
pub(crate) const PAGES: u64 = 32_768;
pub(crate) const CHANNELS: u8 = 4;
/// How often RAM moves.
pub(crate) const PASSES: u64 = 2;

/// One block of RAM; each page of the source's contains its number and the complement, repeatedly.
pub(crate) fn ram(filled: bool) -> Arc<RamBlocks> {
    let length = PAGES * PAGE_SIZE.bytes() as u64;
    let memory = Memory::Mapped(Mapping::anonymous(length).expect("memory"));
    let name = BlockName::new("ram").expect("a name");
    let block = RamBlock::new(name, length, PAGE_SIZE, memory).expect("a block");
    for page in (0..PAGES).filter(|_| filled) {
        block.slice(PageIndex(page), 1).expect("there").copy_from(&contents(page));
    }
    Arc::new(RamBlocks::new(vec![block]).expect("one block"))
}

fn contents(page: u64) -> Vec<u8> {
    let words = [page.to_be_bytes(), (!page).to_be_bytes()].concat();
    words.repeat(PAGE_SIZE.bytes() / words.len())
}

/// The first page that differs from the contents of [`ram`].
pub(crate) fn wrong_page(ram: &RamBlocks) -> Option<u64> {
    let block = ram.get(BlockIndex(0)).expect("there");
    let mut found = vec![0; PAGE_SIZE.bytes()];
    (0..PAGES).find(|page| {
        block.slice(PageIndex(*page), 1).expect("there").copy_to(&mut found);
        found != contents(*page)
    })
}

/// A listener on this machine, and a connector to it.
pub(crate) fn ends() -> (Arc<dyn Connect>, Box<dyn Listen>) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("a listener");
    let address: Address = listener.local_address().clone();
    (Arc::new(address), Box::new(listener))
}

/// Migrates; `passed` is called when the destination has everything of a pass.
pub(crate) fn migrate(
    (connector, listener): (Arc<dyn Connect>, Box<dyn Listen>),
    [source, destination]: [&Arc<RamBlocks>; 2],
    method: Method,
    passed: impl FnMut(Pass),
) -> Vec<ChannelStats> {
    let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.listen(listener).expect("listens");
    let blocks = destination.clone();
    let received = thread::spawn(move || receive(receiver, blocks).expect("received"));

    let stop = Stop::new();
    let context = Context::new(&stop).connect_timeout(Duration::from_secs(20));
    let link = connector.connect(&context).expect("connected");
    let mut main = Answered { stream: Stream::new(link, &context), passed };
    let options = SendOptions::new().channels(CHANNELS).method(method);
    let mut sender = Sender::new(options, source.clone(), stop.clone()).expect("a sender");
    sender.set_up(connector).expect("set up");
    let options = MigrateOptions::new()
        .zero_page_detection(ZeroPageDetection::Multifd)
        .downtime_limit(Duration::from_secs(2000));
    let migration = Migration::new(options, sender).expect("options");
    let info = migration.run(&mut main, &mut AllAgain(0), &mut NoGuest).expect("sent");
    drop(main);
    let received = received.join().expect("no panic");
    assert_eq!(info.channels, received, "both sides have counted the same");
    assert_eq!(info.ram.normal, PASSES * PAGES);
    received
}

/// The destination.
fn receive(receiver: Receiver, blocks: Arc<RamBlocks>) -> Result<Vec<ChannelStats>> {
    let mut main = receiver.wait_main()?;
    let broken = |error| Error::io("follow main", error);
    main.read_exact(&mut [0; 4]).map_err(broken)?;
    receiver.set_blocks(blocks)?;
    for _ in 0..PASSES + 2 {
        main.read_exact(&mut [0]).map_err(broken)?;
        receiver.sync()?;
        main.write_all(b"A").map_err(broken)?;
    }
    main.read_exact(&mut [0]).map_err(broken)?;
    receiver.seal()?;
    main.write_all(b"A").map_err(broken)?;
    receiver.finish()
}

/// A main stream of sync points, each of which is answered.
struct Answered<F> {
    stream: Stream,
    passed: F,
}

impl<F> Answered<F> {
    fn ask(&mut self) -> Result<()> {
        self.stream
            .write_all(b"S")
            .and_then(|()| self.stream.read_exact(&mut [0]))
            .map_err(|error| Error::io("ask the destination", error))
    }
}

impl<F: FnMut(Pass)> Main for Answered<F> {
    fn begin(&mut self, _channels: u8) -> Result<()> {
        self.stream.write_all(b"QEVM").map_err(|error| Error::io("write main", error))
    }
    fn setup(&mut self, _blocks: &RamBlocks, _: Option<Synced<'_>>) -> Result<()> {
        self.ask()
    }
    fn begin_pass(&mut self, _pass: Pass) -> Result<()> {
        Ok(())
    }
    fn zero_page(&mut self, _block: BlockIndex, _page: PageIndex) -> Result<()> {
        unreachable!("zero pages go over the channels")
    }
    fn page(&mut self, _block: BlockIndex, _page: PageIndex, _bytes: &[u8]) -> Result<()> {
        unreachable!("pages go over the channels")
    }
    fn end_pass(&mut self, pass: Pass, _: Option<Synced<'_>>) -> Result<()> {
        self.ask()?;
        (self.passed)(pass);
        Ok(())
    }
    fn switchover(&mut self) -> Result<()> {
        Ok(())
    }
    fn devices(&mut self, _devices: Vec<DeviceSection>, _guest: RunState) -> Result<()> {
        Ok(())
    }
    fn complete(&mut self, _stop: &Stop) -> Verdict {
        self.ask().map_or_else(Verdict::Refused, |()| Verdict::Taken)
    }
    fn expect(&mut self, _devices: &[DeviceInfo]) -> Result<()> {
        Ok(())
    }
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }
    fn end_ram(&mut self, _: Option<Synced<'_>>) -> Result<()> {
        self.ask()
    }
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        Some(self.stream.waker())
    }
    fn send_waker(&self) -> Option<Arc<dyn Wake>> {
        Some(self.stream.write_waker())
    }
    fn bytes(&self) -> u64 {
        0
    }
}

/// Reports every page dirty again at the second take, after the first pass.
struct AllAgain(u32);

impl DirtyLog for AllAgain {
    fn begin(&mut self, _blocks: &RamBlocks) -> std::io::Result<()> {
        Ok(())
    }
    fn take(&mut self, _block: BlockIndex, into: &mut DirtyPages<'_>) -> std::io::Result<()> {
        self.0 += 1;
        if self.0 == 2 {
            into.add_run(PageIndex(0), into.pages());
        }
        Ok(())
    }
    fn put_back(&mut self, _block: BlockIndex, _from: &PageBitmap) {}
}

struct NoGuest;

impl Guest for NoGuest {
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
    fn resume(&mut self) {}
}
