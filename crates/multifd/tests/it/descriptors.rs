//! The engine in a separate process: memory is passed by descriptor, dirty bits over the same socket.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use multifd::{
    ReceiveOptions, Receiver, SendOptions, Sender,
    channel::{Address, Listener, Stop},
    live::{DeviceInfo, DeviceSection, Guest, MigrateOptions, Migration, RunState, ZeroPageDetection},
    ram::{
        Access, BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, DirtyReader, Mapping, Memory, PageBitmap,
        PageIndex, PageSize, RamBlock, RamBlocks,
    },
};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

use crate::kit::{TestMain, difference, fresh, name, receive, spawn, write};

const PAGES: u64 = 4096;

fn blocks_of(memory: &OwnedFd) -> Arc<RamBlocks> {
    let file = File::from(memory.try_clone().expect("a descriptor"));
    let memory = Mapping::of_file(&file, 0, PAGES << 12, Access::ReadWrite).expect("mapped");
    let block = RamBlock::new(name("ram"), PAGES << 12, PageSize::KIB_4, Memory::Mapped(memory));
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))
}

/// The monitor: memory, a writer, and the dirty bits of its writes.
#[test]
fn memory_handed_over_by_descriptor_is_migrated_live_by_another_process() {
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&memory, PAGES << 12).expect("sized");
    fcntl_add_seals(&memory, SealFlags::SHRINK).expect("sealed");
    let source = blocks_of(&memory);
    (0..PAGES).filter(|page| page % 3 != 0).for_each(|page| write(&source, 0, page, 1));

    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let address = listener.local_address().to_string();
    let destination = fresh(PageSize::KIB_4, &[("ram", PAGES << 12)]);
    let received = spawn("destination", {
        let (blocks, receiver) = (destination.clone(), Receiver::new(ReceiveOptions::new(), Stop::new()));
        move || receive(receiver, Box::new(listener), blocks)
    });

    let (mut socket, theirs) = UnixStream::pair().expect("a pair");
    let mut engine = start(theirs, &address);
    pass(&socket, &memory);

    let log = DirtyBitmaps::new(&source);
    let (running, written) = (AtomicBool::new(true), AtomicBool::new(false));
    let served = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut version = 2;
            while running.load(Ordering::Acquire) {
                let page = version * 7919 % PAGES;
                write(&source, 0, page, version);
                log.mark(BlockIndex(0), PageIndex(page));
                version += 1;
                written.store(true, Ordering::Release);
            }
            version
        });
        let mut bits = log.reader().expect("alone");
        let served = serve(&mut socket, &mut bits, || running.store(false, Ordering::Release));
        running.store(false, Ordering::Release);
        // The engine is informed only when everything is stopped.
        served.and_then(|()| {
            assert!(writer.join().expect("no panic") > 2, "the guest was busy");
            socket.write_all(b"s")?;
            serve(&mut socket, &mut bits, || panic!("stopped twice"))
        })
    });
    served.expect("the engine keeps to the talk");
    assert!(engine.wait().expect("waited for").success());
    received.join().expect("no panic").expect("received");
    assert!(written.load(Ordering::Acquire));
    assert_eq!(difference(&source, &destination), None);
}

/// Starts the engine. Only the engine then has its end of the socket open, so the communication ends with it.
fn start(socket: UnixStream, address: &str) -> Child {
    let mut engine = Command::new(std::env::current_exe().expect("this program"));
    engine.args(["--exact", "descriptors::engine", "--include-ignored", "--nocapture"]);
    engine.env(SOCKET, address).stdin(Stdio::from(OwnedFd::from(socket))).stdout(Stdio::null());
    engine.spawn().expect("started")
}

/// Sends dirty bits until the engine wants the guest stopped, or has finished.
fn serve(socket: &mut UnixStream, log: &mut DirtyReader, stop: impl FnOnce()) -> io::Result<()> {
    let mut asked = [0];
    while socket.read(&mut asked)? == 1 {
        match asked[0] {
            b'T' => {
                let taken = PageBitmap::new(PAGES);
                log.take(BlockIndex(0), &mut DirtyPages::new(&taken))?;
                let words: Vec<u8> = taken.words().flat_map(u64::to_be_bytes).collect();
                socket.write_all(&words)?;
            }
            _ => {
                stop();
                return Ok(());
            }
        }
    }
    Ok(())
}

fn pass(socket: &UnixStream, memory: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let (mut control, descriptors) = (SendAncillaryBuffer::new(&mut space), [memory.as_fd()]);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(socket, &[IoSlice::new(b"M")], &mut control, SendFlags::empty()).expect("sent");
}

/// The engine's process, not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn engine() {
    let Ok(address) = std::env::var(SOCKET) else { return };
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().expect("a descriptor"));
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let (mut control, mut byte) = (RecvAncillaryBuffer::new(&mut space), [0]);
    recvmsg(&socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .expect("received");
    let memory = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let blocks = blocks_of(&memory.expect("a descriptor"));
    let (stop, address): (Stop, Address) = (Stop::new(), address.parse().expect("an address"));
    let mut main = TestMain::connect(&address, &stop);
    let mut sender =
        Sender::new(SendOptions::new().channels(3), blocks.clone(), stop.clone()).expect("a sender");
    sender.set_up(Arc::new(address)).expect("set up");
    let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
    let migration = Migration::new(options, sender).expect("options");
    let (mut log, mut guest) = (Beside(socket.try_clone().expect("a clone")), Beside(socket));
    let info = migration.run(&mut main, &mut log, &mut guest).expect("migrated");
    assert!(info.ram.normal > 0);
}

/// The monitor, as its engine sees it.
struct Beside(UnixStream);

impl DirtyLog for Beside {
    fn begin(&mut self, _blocks: &RamBlocks) -> io::Result<()> {
        Ok(())
    }

    fn take(&mut self, _block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        self.0.write_all(b"T")?;
        let mut words = vec![0; usize::try_from(into.pages().div_ceil(64)).expect("few") * 8];
        self.0.read_exact(&mut words)?;
        let word = |bytes: &[u8]| bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        into.add_words(words.chunks(8).map(word));
        Ok(())
    }

    fn put_back(&mut self, _block: BlockIndex, _from: &PageBitmap) {}
}

impl Guest for Beside {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.0.write_all(b"S")?;
        self.0.read_exact(&mut [0])?;
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }

    fn resume(&mut self) {}
}

/// A file of huge pages is mapped and unmapped in whole huge pages, whatever the block's length.
#[test]
fn a_block_that_ends_inside_a_huge_page_is_mapped_and_migrated() {
    let memory = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).expect("a memfd");
    let mapped = ftruncate(&memory, 32 << 20).map_err(io::Error::from).and_then(|()| {
        let file = File::from(memory.try_clone().expect("a descriptor"));
        Mapping::of_file(&file, 0, (3 << 20) + 4096, Access::ReadWrite)
    });
    let mapped = match mapped {
        Ok(mapped) => mapped,
        Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {
            return multifd_testkit::lacks("this machine has no huge pages reserved");
        }
        Err(error) => panic!("{error}"),
    };
    let length = mapped.len();
    assert_eq!(length, (3 << 20) + 4096);
    let block = RamBlock::new(name("ram"), length, PageSize::KIB_4, Memory::Mapped(mapped)).expect("a block");
    let source = Arc::new(RamBlocks::new(vec![block]).expect("one"));
    (0..length >> 12).for_each(|page| write(&source, 0, page, 1));
    let destination = fresh(PageSize::KIB_4, &[("ram", length)]);
    let outcome = crate::kit::migrate(
        &source,
        &destination,
        2,
        MigrateOptions::new(),
        &mut multifd::ram::NeverDirty,
        &mut crate::kit::StoppedGuest::default(),
    );
    outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None);
}

const SOCKET: &str = "MULTIFD_TEST_ENGINE";
