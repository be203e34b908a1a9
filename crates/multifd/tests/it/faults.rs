//! Connections break, peers become silent, callers cancel: every wait ends, and the first cause is reported.

use std::{
    io,
    io::{Read, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::sleep,
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, ReceiveOptions, Receiver, SendOptions, Sender,
    channel::{Connect, Context, Host, Link, Listen, PeerSignal, Stop, Wake, memory},
    error::{Error, Usage, Violation},
    live::{
        DeviceInfo, DeviceSection, Guest, MigrateOptions, Migration, RunState, Status, ZeroPageDetection,
    },
    ram::{
        Access, BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, DirtyReader, Mapping, Memory, NeverDirty,
        PageBitmap, PageIndex, PageSize, Part, PartMut, RamBlock, RamBlocks,
    },
    wire::{ChannelId, HeadBuffer, Initial, VmUuid},
};

use crate::kit::{StoppedGuest, TIMEOUT, TestMain, context, follow, fresh, name, receive, spawn, write};

const RAM: &[(&str, u64)] = &[("pc.ram", 1 << 20)];

/// A connector whose connections fail from the n-th on.
struct FailsFrom(usize, AtomicUsize, memory::MemoryConnector);

impl Connect for FailsFrom {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        if self.1.fetch_add(1, Ordering::Relaxed) >= self.0 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.2.connect(context)
    }
    fn target(&self) -> String {
        "tcp:nowhere:1".into()
    }
}

#[test]
fn a_connect_that_fails_wakes_everyone_who_waits_for_it() {
    let (connector, _listener) = memory::network(1 << 16);
    let mut sender =
        Sender::new(SendOptions::new().channels(4), fresh(PageSize::KIB_4, RAM), Stop::new()).expect("made");
    sender.set_up(Arc::new(FailsFrom(2, AtomicUsize::new(0), connector))).expect("set up");
    let error = sender.wait_connected().expect_err("refused");
    assert!(
        error.to_string().contains(": connect to tcp:nowhere:1: the destination closed the connection"),
        "{error}"
    );
    assert!(matches!(error.kind(), Error::Io { .. }));
    assert!(sender.sync().is_err() && sender.queue(BlockIndex(0), PageIndex(0)).is_err());
}

#[test]
fn a_peer_that_reads_nothing_holds_up_no_cancel() {
    let (connector, _listener) = memory::network(1 << 12);
    let (stop, blocks) = (Stop::new(), fresh(PageSize::KIB_4, RAM));
    let mut sender = Sender::new(SendOptions::new().channels(2), blocks, stop.clone()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let canceller = spawn("canceller", move || {
        sleep(Duration::from_millis(50));
        stop.cancel();
    });
    let error = loop {
        if let Err(error) = sender.queue_run(BlockIndex(0), PageIndex(0), 256) {
            break error;
        }
    };
    assert!(error.is_cancelled());
    let start = Instant::now();
    drop(sender);
    assert!(start.elapsed() < Duration::from_secs(5), "blocked writers were woken and joined");
    canceller.join().expect("no panic");
}

/// Regression: they were dropped, and the sender reported success.
#[test]
fn a_sender_with_pages_that_no_sync_has_followed_does_not_end_well() {
    for pages in [1, 300] {
        let (connector, _listener) = memory::network(4 << 20);
        let (stop, blocks) = (Stop::new(), fresh(PageSize::KIB_4, &[("pc.ram", 2 << 20)]));
        let mut sender = Sender::new(SendOptions::new(), blocks, stop.clone()).expect("made");
        sender.set_up(Arc::new(connector)).expect("set up");
        sender.wait_connected().expect("connected");
        sender.queue_run(BlockIndex(0), PageIndex(0), pages).expect("queued");
        let refused = sender.finish().expect_err("refused");
        assert!(matches!(refused.kind(), Error::Usage(Usage::Unsynced)), "{refused}");
        assert!(matches!(stop.error().expect("stopped").kind(), Error::Usage(Usage::Unsynced)));
    }
}

#[test]
fn ends_are_used_once_and_cleaned_up_as_often_as_one_likes() {
    let (connector, listener) = memory::network(1 << 16);
    let connector: Arc<dyn Connect> = Arc::new(connector);
    let mut sender = Sender::new(SendOptions::new(), fresh(PageSize::KIB_4, RAM), Stop::new()).expect("made");
    sender.clean_up();
    assert!(matches!(sender.sync().expect_err("early").kind(), Error::Usage(Usage::TooEarly(_))));
    assert!(sender.wait_connected().is_err());
    sender.set_up(connector.clone()).expect("a clean-up before set-up does nothing");
    let twice = sender.set_up(connector.clone()).expect_err("refused");
    assert!(matches!(twice.kind(), Error::Usage(Usage::UsedTwice)));
    sender.clean_up();
    sender.clean_up();
    assert!(sender.set_up(connector).is_err());
    let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.clean_up();
    receiver.clean_up();
    assert!(receiver.wait_main().expect_err("over").is_cancelled());
    drop(Receiver::new(ReceiveOptions::new(), Stop::new()));
    drop(Sender::new(SendOptions::new(), fresh(PageSize::KIB_4, RAM), Stop::new()).expect("made"));
}

#[test]
fn options_and_blocks_that_cannot_be_are_refused() {
    let make = |options, blocks| Sender::new(options, blocks, Stop::new()).expect_err("refused").to_string();
    assert_eq!(
        make(SendOptions::new().channels(0), fresh(PageSize::KIB_4, RAM)),
        "expected multifd-channels 1 to 255, found 0"
    );
    assert_eq!(
        make(SendOptions::new(), fresh(PageSize::KIB_64, &[("rom", 4096)])),
        r#"block "rom": 0x1000 bytes end inside a page of 64 KiB, and only whole pages can be sent"#
    );
    let (connector, _listener) = memory::network(1 << 16);
    let mut sender = Sender::new(SendOptions::new(), fresh(PageSize::KIB_4, RAM), Stop::new()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let far = sender.queue(BlockIndex(0), PageIndex(256)).expect_err("refused").to_string();
    assert_eq!(far, r#"block "pc.ram" has no page 256 (256 pages)"#);
    assert!(sender.queue(BlockIndex(1), PageIndex(0)).is_err());
}

/// A destination that fails at a chosen moment, and a log that records what was put back.
struct Watched {
    bits: DirtyReader,
    put_back: u64,
}

impl DirtyLog for Watched {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.bits.begin(blocks)
    }
    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        self.bits.take(block, into)
    }
    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.put_back += from.count();
        self.bits.put_back(block, from);
    }
}

#[test]
fn a_destination_that_fails_at_the_end_leaves_the_guest_running_and_every_page_dirty() {
    let (connector, listener) = memory::network(1 << 16);
    let destination = spawn("destination", move || {
        let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
        receiver.listen(Box::new(listener)).expect("listening");
        let mut main = receiver.wait_main().expect("main");
        receiver.set_blocks(fresh(PageSize::KIB_4, RAM)).expect("set");
        main.read_exact(&mut [0; b"QEVM".len()]).expect("a main stream");
        for point in ["setup", "first pass", "final pass", "end of RAM"] {
            main.read_exact(&mut [0; b"S".len()]).expect(point);
            receiver.sync().expect(point);
        }
        main.read_exact(&mut [0; b"E".len()]).expect("read to the end");
        main.write_all(b"N").expect("written");
    });
    let (stop, blocks) = (Stop::new(), fresh(PageSize::KIB_4, RAM));
    write(&blocks, 0, 3, 1);
    let mut main = TestMain::connect(&connector, &stop);
    let mut sender = Sender::new(SendOptions::new(), blocks.clone(), stop.clone()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let mut log = Watched { bits: DirtyBitmaps::new(&blocks).reader().expect("alone"), put_back: 0 };
    let mut guest = StoppedGuest::default();
    let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::None);
    let migration = Migration::new(options, sender).expect("options");
    let progress = migration.progress();
    let error = migration.run(&mut main, &mut log, &mut guest).expect_err("failed");
    assert_eq!(error.to_string(), "the destination failed");
    assert_eq!(progress.status(), Status::Failed);
    assert!(guest.resumed);
    assert_eq!(log.put_back, 256);
    destination.join().expect("no panic");
}

/// A guest that cancels the migration in `stop`.
struct Cancels(Stop, bool);

impl Guest for Cancels {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.0.cancel();
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }
    fn resume(&mut self) {
        self.1 = true;
    }
}

#[test]
fn a_cancel_after_the_guest_has_stopped_lets_it_run_on() {
    let (connector, listener) = memory::network(1 << 16);
    let destination = spawn("destination", move || {
        receive(
            Receiver::new(ReceiveOptions::new(), Stop::new()),
            Box::new(listener),
            fresh(PageSize::KIB_4, RAM),
        )
    });
    let (stop, blocks) = (Stop::new(), fresh(PageSize::KIB_4, RAM));
    let mut main = TestMain::connect(&connector, &stop);
    let mut sender = Sender::new(SendOptions::new().channels(3), blocks.clone(), stop.clone()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let mut guest = Cancels(stop.clone(), false);
    let migration = Migration::new(MigrateOptions::new(), sender).expect("options");
    let progress = migration.progress();
    let error = migration.run(&mut main, &mut NeverDirty, &mut guest).expect_err("cancelled");
    assert!(error.is_cancelled() && guest.1);
    assert_eq!(progress.status(), Status::Cancelled);
    drop(main);
    destination.join().expect("no panic").expect_err("the destination has nothing");
}

fn channel(connector: &dyn Connect, id: u8) -> Box<dyn Link> {
    let mut link = connector.connect(&context()).expect("connected");
    let initial = Initial { uuid: VmUuid::NIL, id: ChannelId(id) }.encode();
    assert_eq!(link.send(&[initial[..].into()]).expect("sent"), 64);
    link
}

#[test]
fn a_channel_that_ends_early_fails_the_wait_at_once() {
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.set_blocks(fresh(PageSize::KIB_4, RAM)).expect("set");
    let _stays = channel(&connector, 0);
    drop(channel(&connector, 1));
    let start = Instant::now();
    let error = receiver.sync().expect_err("it cannot come");
    assert_eq!(
        error.to_string(),
        "channel 1: the source closed the channel (cancelled, or its process ended) before sync point 1, after sync point 0"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn too_few_channels_are_told_after_the_time_limit() {
    let (connector, listener) = memory::network(1 << 16);
    let options =
        ReceiveOptions::new().channels(ChannelCount::Exact(3)).channels_timeout(Duration::from_millis(50));
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    let _link = channel(&connector, 2);
    let error = receiver.sync().expect_err("two are missing");
    assert!(
        matches!(error.kind(), Error::Violation(Violation::ChannelCount { expected: 3, found: 1 })),
        "{error}"
    );
}

#[test]
fn a_silent_stranger_holds_up_nobody_for_longer_than_its_limit() {
    let (connector, listener) = memory::network(1 << 16);
    let options = ReceiveOptions::new().greeting_timeout(Duration::from_millis(50));
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    let _silent = connector.connect(&context()).expect("connected");
    let mut chatty = connector.connect(&context()).expect("connected");
    chatty
        .send(&[
            b"GET / HTTP/1.1\r\n\r\n0123456789012345678901234567890123456789012345678901234567890"[..].into()
        ])
        .expect("sent");
    receiver.sync().expect("no channels, so nothing to wait for");
    assert_eq!(receiver.channels(), 0);
}

/// Regression: the time limit applied to each byte, so a peer that sent one byte from time to time had hundreds of
/// limits.
#[test]
fn a_peer_that_drips_gains_no_time_by_it() {
    let (connector, listener) = memory::network(1 << 16);
    let options = ReceiveOptions::new().greeting_timeout(Duration::from_millis(100));
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    let mut drip = connector.connect(&context()).expect("connected");
    let dripper = spawn("dripper", move || {
        while drip.send(&[b"\x11"[..].into()]).is_ok() {
            sleep(Duration::from_millis(40));
        }
    });
    let start = Instant::now();
    receiver.sync().expect("no channels, so nothing to wait for");
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    dripper.join().expect("no panic");
}

/// Regression: if a source had more channels than expected, the last one was not waited for. When it was slow to send
/// its identity, the migration ended successfully without its pages.
#[test]
fn a_channel_too_many_that_is_slow_to_say_so_is_met_all_the_same() {
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(0)), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    let _main = TestMain::connect(&connector, &Stop::new());
    let _taken = receiver.wait_main().expect("main");
    let mut late = connector.connect(&context()).expect("connected");
    let saying = spawn("late", move || {
        sleep(Duration::from_millis(300));
        let initial = Initial { uuid: VmUuid::NIL, id: ChannelId(0) }.encode();
        late.send(&[initial[..].into()]).expect("sent");
        late
    });
    let error = receiver.sync().expect_err("a channel that is not expected");
    assert!(matches!(error.kind(), Error::Violation(Violation::ChannelId { channels: 0, .. })), "{error}");
    saying.join().expect("no panic");
}

/// Regression: a connection without an identity was not woken at a normal end, which waited for its time limit.
#[test]
fn a_silent_stranger_does_not_hold_up_the_end() {
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(1)), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.set_blocks(fresh(PageSize::KIB_4, RAM)).expect("set");
    let _silent = connector.connect(&context()).expect("connected");
    let mut first = channel(&connector, 0);
    first.send(&[HeadBuffer::new(PageSize::KIB_4).sync(0).into()]).expect("sent");
    first.close_send().expect("open");
    let start = Instant::now();
    receiver.sync().expect("the one channel is here");
    receiver.finish().expect("a good end");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn memory_mapped_for_reading_is_refused_by_a_receiver() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(4096).expect("sized");
    let memory = Memory::Mapped(Mapping::of_file(&file, 0, 4096, Access::Read).expect("mapped"));
    let block = RamBlock::new(name("rom"), 4096, PageSize::KIB_4, memory).expect("a block");
    let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    let blocks = Arc::new(RamBlocks::new(vec![block]).expect("one"));
    let refused = receiver.set_blocks(blocks).expect_err("refused");
    assert_eq!(refused.to_string(), r#"block "rom" is mapped for reading only and cannot receive pages"#);
}

#[test]
fn main_that_breaks_off_is_an_error_and_ends_all_threads() {
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    let _channels: Vec<_> = (0..3).map(|id| channel(&connector, id)).collect();
    let main = TestMain::connect(&connector, &Stop::new());
    drop(main);
    let error = follow(receiver, &fresh(PageSize::KIB_4, RAM)).expect_err("broken off");
    assert_eq!(error.to_string(), "read main");
}

/// A link that panics in send or receive.
struct Panics(Box<dyn Link>);

impl Link for Panics {
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

    fn send(&mut self, _parts: &[Part<'_>]) -> io::Result<usize> {
        panic!("a link that the test has broken")
    }
    fn recv(&mut self, _parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        panic!("a link that the test has broken")
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

struct PanickingConnector(memory::MemoryConnector);

impl Connect for PanickingConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Panics(self.0.connect(context)?)))
    }
    fn target(&self) -> String {
        self.0.target()
    }
}

/// Regression: other threads waited without limit for a thread that panicked.
#[test]
fn a_thread_that_panics_fails_the_migration() {
    let (connector, _listener) = memory::network(1 << 16);
    let mut sender = Sender::new(SendOptions::new(), fresh(PageSize::KIB_4, RAM), Stop::new()).expect("made");
    sender.set_up(Arc::new(PanickingConnector(connector))).expect("set up");
    let error = sender.wait_connected().expect_err("no channel is left");
    assert_eq!(error.to_string(), "a channel's thread panicked");

    let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    receiver.add(Box::new(Panics(Box::new(memory::pair(64, &context(), &context()).0))));
    let error = receiver.sync().expect_err("it will never say what it is");
    assert_eq!(error.to_string(), "a channel's thread panicked");
}

/// Reports that it is being woken, and delays the wakers after it.
struct Slow {
    told: mpsc::Sender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Wake for Slow {
    fn wake(&self) {
        self.told.send(()).expect("the test waits");
        self.go_on.lock().expect("whole").recv().expect("the test goes on");
    }
}

/// Reports when the acceptor waits on it again after a wake, or has dropped it.
struct Telling {
    listener: memory::MemoryListener,
    told: mpsc::Sender<()>,
    woken: bool,
}

impl Listen for Telling {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        if self.woken {
            self.told.send(()).expect("the test waits");
        }
        let accepted = self.listener.accept(context)?;
        self.woken = accepted.is_none();
        Ok(accepted)
    }
    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        self.listener.accept_waiting(context)
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.listener.waker()
    }
    fn address(&self) -> String {
        self.listener.address()
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        let _ = self.told.send(());
    }
}

/// Regression: a listener was registered while a stop woke the registered wakers. The acceptor was woken, did not find
/// its receiver stopped yet, and waited again without ever being woken. Threads that joined it waited, too.
#[test]
fn a_listener_that_comes_while_the_stop_wakes_the_others_ends_as_well() {
    let (told, hears) = mpsc::channel();
    let (go_on, waits) = mpsc::channel();
    let stop = Stop::new();
    let _slow = stop.watch(Arc::new(Slow { told: told.clone(), go_on: Mutex::new(waits) }));
    let mut receiver = Receiver::new(ReceiveOptions::new(), stop.clone());
    let cancelling = spawn("cancel", move || stop.cancel());
    hears.recv_timeout(TIMEOUT).expect("the stop wakes");
    let (_connector, listener) = memory::network(1 << 16);
    receiver.listen(Box::new(Telling { listener, told: told.clone(), woken: false })).expect("listening");
    hears.recv_timeout(TIMEOUT).expect("the acceptor is woken");
    go_on.send(()).expect("it waits");
    cancelling.join().expect("no panic");
    let _dropping = spawn("drop", move || {
        drop(receiver);
        told.send(())
    });
    hears.recv_timeout(TIMEOUT).expect("all threads end");
}
