//! The destination receives what the source sends.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use multifd::{
    ChannelCount, ReceiveOptions, Receiver, SendOptions, Sender,
    channel::{Connect, Context, Host, Link, PeerSignal, Stop, Wake, memory},
    live::{
        DeviceInfo, DeviceSection, Guest, MigrateOptions, Migration, RunState, Status, ZeroPageDetection,
    },
    ram::{BlockIndex, DirtyBitmaps, NeverDirty, PageIndex, PageSize, Part, PartMut, RamBlocks},
    wire::head_len,
};

use crate::kit::{
    StoppedGuest, TestMain, difference, fresh, migrate, migrate_stopped, receive, spawn, write,
};

/// Blocks of every kind: large, small, empty, with holes.
pub(crate) const BLOCKS: &[(&str, u64)] =
    &[("pc.ram", 8 << 20), ("/rom@etc/acpi/tables", 128 << 10), ("empty", 0), ("vga.vram", 1 << 20)];

pub(crate) fn filled(page_size: PageSize) -> Arc<RamBlocks> {
    let blocks = fresh(page_size, BLOCKS);
    for (index, block) in blocks.iter() {
        for page in (0..block.pages()).filter(|page| page % 3 != 1) {
            write(&blocks, index.0, page, 1);
        }
    }
    blocks
}

/// Both sides share its memory: a page of it, even a zero one, would be written into memory that the source still uses.
#[test]
fn no_page_of_a_block_that_is_ignored_is_sent() {
    const LIST: &[(&str, u64)] = &[("sent", 1 << 20), ("shared", 1 << 20)];
    for channels in [0, 2] {
        let plain = fresh(PageSize::KIB_4, LIST);
        write(&plain, 0, 3, 1);
        write(&plain, 1, 3, 1);
        let blocks = Arc::into_inner(plain).expect("alone").into_iter();
        let blocks =
            blocks.map(|block| if block.name().as_bytes() == b"shared" { block.ignored() } else { block });
        let source = Arc::new(RamBlocks::new(blocks.collect()).expect("two blocks"));
        let destination = fresh(PageSize::KIB_4, LIST);
        let bits = DirtyBitmaps::new(&source);
        bits.mark(BlockIndex(0), PageIndex(7));
        bits.mark(BlockIndex(1), PageIndex(7));
        let mut log = bits.reader().expect("alone");
        let (options, guest) = (MigrateOptions::new(), &mut StoppedGuest::default());
        let outcome = migrate(&source, &destination, channels, options, &mut log, guest);
        outcome.received.expect("received");
        let ram = outcome.sent.expect("sent").ram;
        let [sent, shared] = [0, 1].map(|block| destination.get(BlockIndex(block)).expect("there"));
        assert!(shared.slice(PageIndex(3), 1).expect("a page").is_zero(), "{channels} channels");
        assert!(ram.normal + ram.duplicate <= 2 * 256, "{ram:?}");
        assert!(!sent.slice(PageIndex(3), 1).expect("a page").is_zero());
    }
}

#[test]
fn a_stopped_machine_arrives_whole_over_any_number_of_channels() {
    for channels in [0, 1, 2, 3, 8, 33] {
        for detection in [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd] {
            let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
            let options = MigrateOptions::new().zero_page_detection(detection);
            let outcome = migrate_stopped(&source, &destination, channels, options);
            let (sent, received) = (outcome.sent.expect("sent"), outcome.received.expect("received"));
            assert_eq!(difference(&source, &destination), None, "{channels} channels, {detection:?}");
            assert_eq!(sent.status, Status::Completed);
            assert_eq!(sent.channels, received, "both sides have counted the same");
            let pages: u64 = source.iter().map(|(_, block)| block.pages()).sum();
            assert_eq!(sent.ram.normal + sent.ram.duplicate, pages);
            assert_eq!(sent.ram.duplicate > 0, detection != ZeroPageDetection::None);
            let heads = head_len(PageSize::KIB_4) as u64;
            for channel in &sent.channels {
                assert_eq!(channel.bytes, 64 + channel.packets * heads + channel.normal * 4096);
            }
            assert_eq!(
                sent.ram.transferred,
                sent.ram.multifd_bytes + sent.ram.precopy_bytes + sent.ram.downtime_bytes
            );
        }
    }
}

#[test]
fn pages_of_16_and_64_kib_arrive() {
    for page_size in [PageSize::KIB_16, PageSize::KIB_64] {
        let (source, destination) = (filled(page_size), fresh(page_size, BLOCKS));
        let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
        let outcome =
            migrate(&source, &destination, 3, options, &mut NeverDirty, &mut StoppedGuest::default());
        outcome.sent.expect("sent");
        outcome.received.expect("received");
        assert_eq!(difference(&source, &destination), None, "{page_size}");
    }
}

#[test]
fn memory_that_held_something_else_is_overwritten_by_zero_pages() {
    for detection in [ZeroPageDetection::Legacy, ZeroPageDetection::Multifd] {
        let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
        for (index, block) in destination.iter() {
            (0..block.pages()).for_each(|page| write(&destination, index.0, page, 0xdead));
        }
        let options = MigrateOptions::new().zero_page_detection(detection);
        let outcome =
            migrate(&source, &destination, 2, options, &mut NeverDirty, &mut StoppedGuest::default());
        outcome.received.expect("received");
        assert_eq!(difference(&source, &destination), None, "{detection:?}");
    }
}

#[test]
fn three_hundred_blocks_arrive() {
    let names: Vec<String> = (0..300).map(|n| format!("block{n}")).collect();
    let list: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 3 * 4096)).collect();
    let (source, destination) = (fresh(PageSize::KIB_4, &list), fresh(PageSize::KIB_4, &list));
    (0..300).for_each(|block| write(&source, block, 1, 9));
    let outcome = migrate(
        &source,
        &destination,
        4,
        MigrateOptions::new(),
        &mut NeverDirty,
        &mut StoppedGuest::default(),
    );
    outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None);
}

#[test]
fn the_last_page_of_terabytes_arrives() {
    const TERABYTES: &[(&str, u64)] = &[("small", 4096), ("huge", 2 << 40)];
    let (source, destination) = (fresh(PageSize::KIB_4, TERABYTES), fresh(PageSize::KIB_4, TERABYTES));
    let last = (2 << 40) / 4096 - 1;
    write(&source, 1, last, 5);
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(2)), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.set_blocks(destination.clone()).expect("set");
    let mut sender = Sender::new(SendOptions::new(), source.clone(), Stop::new()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    sender.queue(BlockIndex(1), PageIndex(last)).expect("queued");
    let sent = spawn("source", move || sender.sync().map(drop).and_then(|()| sender.finish()));
    receiver.sync().expect("passed");
    let arrived = [0, 1].map(|block| receiver.arrived().expect("set").count(BlockIndex(block)));
    receiver.finish().expect("received");
    sent.join().expect("no panic").expect("sent");
    let page = |blocks: &RamBlocks| {
        let mut bytes = vec![0; 4096];
        let block = blocks.block(BlockIndex(1)).expect("there");
        block.slice(PageIndex(last), 1).expect("there").copy_to(&mut bytes);
        bytes
    };
    assert_eq!(page(&source), page(&destination));
    assert_eq!(arrived, [0, 1]);
}

/// Counts the bytes on a connection, independently of the engine's own counters.
struct Counting(Box<dyn Link>, Arc<AtomicU64>);

impl Link for Counting {
    fn is_readable(&mut self) -> io::Result<bool> {
        self.0.is_readable()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.0.peer_signal()
    }

    fn host(&self) -> Option<Host> {
        self.0.host()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.0.finish()
    }

    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let sent = self.0.send(parts)?;
        self.1.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(sent)
    }
    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        self.0.recv(parts)
    }
    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.0.set_recv_timeout(limit)
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.0.waker()
    }
    fn send_waker(&self) -> Arc<dyn Wake> {
        self.0.send_waker()
    }
    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.0.recv_waker()
    }
    fn peer(&self) -> String {
        self.0.peer()
    }
    fn close_send(&mut self) -> io::Result<()> {
        self.0.close_send()
    }
}

struct CountingConnector(memory::MemoryConnector, Arc<AtomicU64>);

impl Connect for CountingConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Counting(self.0.connect(context)?, self.1.clone())))
    }
    fn target(&self) -> String {
        self.0.target()
    }
}

#[test]
fn the_bytes_counted_are_the_bytes_on_the_connections() {
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let (connector, listener) = memory::network(10_000);
    let (stop, on_channels) = (Stop::new(), Arc::new(AtomicU64::new(0)));
    let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    let received = spawn("destination", move || receive(receiver, Box::new(listener), destination));
    let mut main = TestMain::connect(&connector, &stop);
    let mut sender = Sender::new(SendOptions::new().channels(5), source.clone(), stop.clone()).expect("made");
    sender.set_up(Arc::new(CountingConnector(connector, on_channels.clone()))).expect("set up");
    let migration = Migration::new(MigrateOptions::new(), sender).expect("options");
    let sent = migration.run(&mut main, &mut NeverDirty, &mut StoppedGuest::default()).expect("sent");
    assert_eq!(sent.ram.multifd_bytes, on_channels.load(Ordering::Relaxed));
    assert_eq!(sent.ram.precopy_bytes + sent.ram.downtime_bytes, main.bytes);
    let received = received.join().expect("no panic").expect("received");
    assert_eq!(
        received.iter().map(|channel| channel.bytes).sum::<u64>(),
        on_channels.load(Ordering::Relaxed)
    );
}

/// Threads that write to RAM and mark what they wrote, until they are stopped.
pub(crate) struct Writers {
    run: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
    stopped: bool,
}

impl Writers {
    pub(crate) fn start(blocks: &Arc<RamBlocks>, log: &DirtyBitmaps, pages: u64, pause: Duration) -> Self {
        let run = Arc::new(AtomicBool::new(true));
        let version = Arc::new(AtomicU64::new(2));
        let threads = (0..2).map(|thread| {
            let (blocks, log, run, version) = (blocks.clone(), log.clone(), run.clone(), version.clone());
            spawn("writer", move || {
                // A page belongs to one writer, so that its contents are one version and not a mixture.
                while run.load(Ordering::Relaxed) {
                    for page in (0..pages).filter(|page| page % 2 == thread) {
                        write(&blocks, 0, page, version.fetch_add(1, Ordering::Relaxed) & 0xffff);
                        log.mark(BlockIndex(0), PageIndex(page));
                    }
                    std::thread::sleep(pause);
                }
            })
        });
        Self { threads: threads.collect(), run, stopped: false }
    }
}

impl Guest for Writers {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.run.store(false, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().expect("no panic"));
        self.stopped = true;
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }

    fn resume(&mut self) {}
}

#[test]
fn a_guest_that_keeps_writing_arrives_as_it_was_when_it_stopped() {
    for channels in [0, 1, 4] {
        let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
        let bits = DirtyBitmaps::new(&source);
        let mut log = bits.reader().expect("alone");
        let mut writers = Writers::start(&source, &bits, 600, Duration::from_micros(200));
        // So short that several passes are needed; the writers pause, so that one pass finds little.
        let options = MigrateOptions::new().downtime_limit(Duration::from_millis(2));
        let outcome = migrate(&source, &destination, channels, options, &mut log, &mut writers);
        let sent = outcome.sent.expect("sent");
        outcome.received.expect("received");
        assert!(writers.stopped);
        assert_eq!(difference(&source, &destination), None, "{channels} channels");
        assert!(sent.ram.dirty_sync_count >= 3, "{sent:?}");
        assert!(sent.downtime.is_some());
    }
}

#[test]
fn max_bandwidth_is_kept_while_the_guest_runs() {
    let (source, destination) =
        (fresh(PageSize::KIB_4, &[("pc.ram", 2 << 20)]), fresh(PageSize::KIB_4, &[("pc.ram", 2 << 20)]));
    (0..512).for_each(|page| write(&source, 0, page, 1));
    let options = MigrateOptions::new().max_bandwidth(Some(4 << 20));
    let outcome = migrate(&source, &destination, 2, options, &mut NeverDirty, &mut StoppedGuest::default());
    let sent = outcome.sent.expect("sent");
    // 2 MiB at 4 MiB/s take half a second, minus what the first and last time slice allow.
    assert!(sent.total_time >= Duration::from_millis(350), "{:?}", sent.total_time);
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None);
}
