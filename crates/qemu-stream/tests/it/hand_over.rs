//! Memory is handed over to another process of the host: by descriptor, in a migration as any other.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use multifd::{
    Error, Fault, ReceiveOptions, Result,
    channel::{
        Address, Stop,
        hand_over::{HandOver, HandOverListener, HandedOver, SharedMemory},
    },
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{
        Access, BlockIndex, BlockName, Mapping, Memory, NeverDirty, PageIndex, PageSize, RamBlock, RamBlocks,
    },
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, Confirmed},
    format::{Configuration, MachineType},
    incoming::Expected,
    source::{Source, SourceOptions},
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

const RAM: u64 = 64 << 20;
const ROM: u64 = 16 << 12;
/// The second half of the file is the block.
const OFFSET: u64 = RAM;
const COUNTER: DeviceName = DeviceName::from_static("counter");

fn name(name: &str) -> BlockName {
    BlockName::new(name).unwrap()
}

/// A machine with memory in a file, and a ROM that is not.
struct Machine {
    file: File,
    blocks: Arc<RamBlocks>,
    runs: bool,
}

impl Machine {
    fn new() -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("ram", flags).unwrap());
        file.set_len(OFFSET + RAM).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let mapping = Mapping::of_file(&file, OFFSET, RAM, Access::ReadWrite).unwrap();
        let ram =
            RamBlock::new(name("ram"), RAM, PageSize::KIB_4, Memory::Mapped(mapping)).unwrap().ignored();
        let mapping = Mapping::anonymous(ROM).unwrap();
        let rom = RamBlock::new(name("rom"), ROM, PageSize::KIB_4, Memory::Mapped(mapping)).unwrap();
        let blocks = Arc::new(RamBlocks::new(vec![ram, rom]).unwrap());
        let machine = Self { file, blocks, runs: true };
        for (block, page) in [(0, 0), (0, 4711), (0, RAM / 4096 - 1), (1, 3)] {
            machine.store(block, page, fill(block, page));
        }
        machine
    }

    fn store(&self, block: usize, page: u64, byte: u8) {
        self.blocks.block(BlockIndex(block)).unwrap().store(PageIndex(page), &[byte; 4096]).unwrap();
    }

    fn shared(&self) -> Vec<SharedMemory> {
        let file = self.file.try_clone().unwrap();
        vec![SharedMemory { block: name("ram"), file, offset: OFFSET, length: RAM }]
    }

    fn source(&self, stop: &Stop) -> Result<Source> {
        let configuration = Configuration { ignore_shared: true, ..configuration() };
        Source::new(self.blocks.clone(), SourceOptions::new(configuration).channels(0), stop)
    }

    /// Moves it to the process that listens at `path`.
    fn hand_over(&mut self, path: &Path) -> Result<u64> {
        let stop = Stop::new();
        let connector = HandOver::new(&address(path), &self.blocks, self.shared())?;
        let info = self.source(&stop)?.migrate(connector, &mut NeverDirty, self)?;
        Ok(info.ram.transferred)
    }
}

fn fill(block: usize, page: u64) -> u8 {
    u8::try_from(page % 200).unwrap() + u8::try_from(block).unwrap() + 1
}

fn byte(blocks: &RamBlocks, block: usize, page: u64) -> u8 {
    let mut bytes = [0; 4096];
    blocks.block(BlockIndex(block)).unwrap().load(PageIndex(page), &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

fn configuration() -> Configuration {
    Configuration::new(MachineType::new("my-vmm-1").unwrap())
}

fn address(path: &Path) -> Address {
    Address::Unix(path.to_owned())
}

impl Guest for Machine {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(COUNTER, 8)]
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.runs = false;
        // Its last write.
        self.store(0, 77, 99);
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(vec![DeviceSection { name: COUNTER, instance_id: 0, version: 1, data: vec![7; 8] }])
    }
    fn resume(&mut self) {
        self.runs = true;
    }
}

type Take = fn(&HandedOver) -> Result<Vec<SharedMemory>>;

/// Receives the machine, whose memory `take` returns.
fn receive(listener: HandOverListener, handed: &HandedOver, take: Take) -> Result<Confirmed> {
    let receive = ReceiveOptions::new().accept_timeout(Some(Duration::from_secs(3)));
    let options = ArrivalOptions::new(Expected::AnyMachine).receive(receive);
    let options = options.stall_timeout(Some(Duration::from_secs(20)));
    let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;
    let pending = arrival.load(|_, list| list.in_memory_of(&take(handed)?))?;
    assert_eq!(pending.device("counter", 0).unwrap().1, [7; 8]);
    pending.confirm()
}

/// Both sides, in two threads.
fn both(machine: &mut Machine, take: Take) -> (Result<u64>, Result<Confirmed>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (listener, handed) = HandOverListener::bind(&address(&path)).unwrap();
    thread::scope(|threads| {
        let received = threads.spawn(|| receive(listener, &handed, take));
        let left = machine.hand_over(&path);
        (left, received.join().unwrap())
    })
}

#[test]
fn guest_continues_in_the_same_memory() {
    let mut machine = Machine::new();
    let (left, received) = both(&mut machine, HandedOver::take);
    let transferred = left.unwrap();
    assert!(transferred < 100_000, "{transferred} bytes for {RAM:#x} of memory");
    let confirmed = received.unwrap();
    assert!(!machine.runs && confirmed.run_state() == RunState::Running);
    let there = confirmed.blocks();
    for (block, page) in [(0, 0), (0, 4711), (0, RAM / 4096 - 1), (1, 3)] {
        assert_eq!(byte(there, block, page), fill(block, page), "block {block}, page {page}");
    }
    assert_eq!(byte(there, 0, 77), 99);
    // The same memory, not a copy; the ROM is a copy.
    for (block, expected) in [(0, 55), (1, 0)] {
        let before = byte(there, block, 5);
        machine.store(block, 5, 55);
        assert_eq!(byte(there, block, 5), expected.max(before));
    }
    confirmed.finish();
}

#[test]
fn guest_is_back_at_the_source_if_the_destination_refuses() {
    let mut machine = Machine::new();
    let refuses: Take = |handed| {
        drop(handed.take()?);
        Err(Error::text("no room here"))
    };
    let (left, received) = both(&mut machine, refuses);
    let error = multifd::error::chain(&left.unwrap_err()).to_string();
    assert!(error.contains("no room here") && received.is_err(), "{error}");
    assert!(machine.runs);
    assert_eq!(byte(&machine.blocks, 0, 4711), fill(0, 4711));
    // Another attempt succeeds.
    let (left, received) = both(&mut machine, HandedOver::take);
    left.unwrap();
    assert_eq!(byte(received.unwrap().blocks(), 0, 4711), fill(0, 4711));
}

/// The destination takes the memory for new memory: the guest must not continue without its pages.
#[test]
fn memory_that_is_not_taken_is_missed() {
    let mut machine = Machine::new();
    let (left, received) = both(&mut machine, |_| Ok(Vec::new()));
    assert!(left.is_err() && machine.runs);
    let error = multifd::error::chain(&received.unwrap_err()).to_string();
    assert!(error.contains("did not arrive"), "{error}");
}

#[test]
fn source_that_hands_nothing_over_is_refused_by_name() {
    let mut machine = Machine::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (listener, handed) = HandOverListener::bind(&address(&path)).unwrap();
    let (left, received) = thread::scope(|threads| {
        let received = threads.spawn(|| receive(listener, &handed, HandedOver::take));
        let source = machine.source(&Stop::new()).unwrap();
        let left = source.migrate(address(&path), &mut NeverDirty, &mut machine);
        (left, received.join().unwrap())
    });
    let error = multifd::error::chain(&received.unwrap_err()).to_string();
    assert!(error.contains("it has handed over no memory"), "{error}");
    let error = left.unwrap_err();
    assert!(error.fault() == Fault::Peer && machine.runs, "{error}");
}

/// Strangers that connect and hand over what is not a machine are dropped, and the source gets in.
#[test]
fn strangers_do_not_prevent_the_hand_over() {
    let mut machine = Machine::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (listener, handed) = HandOverListener::bind(&address(&path)).unwrap();
    let mut strangers: Vec<_> = (0..4).map(|_| UnixStream::connect(&path).unwrap()).collect();
    strangers[0].write_all(b"mfHO\0\x02\0\0\0\0\0\0").unwrap();
    strangers[1]
        .write_all(
            b"mfHO\0\x01\0\0\0\0\0\0what is this? It is neither a main stream nor a channel of any migration",
        )
        .unwrap();
    strangers[2].write_all(b"mfHO\0\x01").unwrap();
    strangers[3].write_all(b"nonsense that is no packet at all, and long enough to be sure of it").unwrap();
    let (left, received) = thread::scope(|threads| {
        let received = threads.spawn(|| receive(listener, &handed, HandedOver::take));
        // Until those that are complete are dropped.
        for stranger in [0, 1, 3] {
            let _ = io::Read::read(&mut strangers[stranger], &mut [0]);
        }
        (machine.hand_over(&path), received.join().unwrap())
    });
    left.unwrap();
    assert_eq!(byte(received.unwrap().blocks(), 0, 4711), fill(0, 4711));
}

#[test]
fn destination_that_expects_no_memory_refuses_and_the_guest_stays() {
    let mut machine = Machine::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = multifd::channel::Listener::bind(&address(&path)).unwrap();
    let stop = Stop::new();
    let left = thread::scope(|threads| {
        threads.spawn(|| {
            let options = ArrivalOptions::new(Expected::AnyMachine);
            let listening = Arrival::listen(listener, options, &stop).unwrap();
            assert!(listening.accept().is_err());
        });
        let left = machine.hand_over(&path);
        stop.cancel();
        left
    });
    assert!(left.unwrap_err().fault() == Fault::Connection && machine.runs);
}

#[test]
fn memory_that_is_not_that_of_the_blocks_is_refused_before_anything_is_connected() {
    let machine = Machine::new();
    let other = File::from(memfd_create("other", MemfdFlags::CLOEXEC).unwrap());
    other.set_len(OFFSET + RAM).unwrap();
    let shared = |block: &str, file: &File, offset, length| SharedMemory {
        block: name(block),
        file: file.try_clone().unwrap(),
        offset,
        length,
    };
    let unix = address(Path::new("/nowhere"));
    let file = &machine.file;
    for (memory, expected) in [
        (vec![], "block \"ram\" has no file"),
        (vec![shared("ram", file, OFFSET, RAM / 2)], "block \"ram\" has 0x4000000 bytes, not 0x2000000"),
        (vec![shared("ram", &other, OFFSET, RAM)], "it is of another file"),
        (vec![shared("ram", file, 0, RAM)], "it is the file at 0x4000000"),
        ([machine.shared(), machine.shared()].concat_all(), "block \"ram\" has two files"),
        (
            [machine.shared(), vec![shared("rom", file, 0, ROM)]].concat_all(),
            "block \"rom\" does not exist, or is not ignored",
        ),
        ([machine.shared(), vec![shared("moo", file, 0, ROM)]].concat_all(), "block \"moo\" does not exist"),
    ] {
        let error = HandOver::new(&unix, &machine.blocks, memory).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let tcp: Address = "tcp:127.0.0.1:1".parse().unwrap();
    let error = HandOver::new(&tcp, &machine.blocks, machine.shared()).unwrap_err().to_string();
    assert!(error.contains("is not a unix socket"), "{error}");
}

#[test]
fn channels_are_refused_because_they_have_nothing_to_send() {
    let mut machine = Machine::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (listener, handed) = HandOverListener::bind(&address(&path)).unwrap();
    let left = thread::scope(|threads| {
        threads.spawn(|| receive(listener, &handed, HandedOver::take));
        let configuration = Configuration { ignore_shared: true, ..configuration() };
        let options = SourceOptions::new(configuration).channels(2);
        let source = Source::new(machine.blocks.clone(), options, &Stop::new()).unwrap();
        let connector = HandOver::new(&address(&path), &machine.blocks, machine.shared()).unwrap();
        source.migrate(connector, &mut NeverDirty, &mut machine)
    });
    let error = left.unwrap_err();
    assert!(error.fault() == Fault::Caller && error.to_string().contains("single connection"), "{error}");
    assert!(machine.runs);
}

trait ConcatAll<T> {
    fn concat_all(self) -> Vec<T>;
}

impl<T, const N: usize> ConcatAll<T> for [Vec<T>; N] {
    fn concat_all(self) -> Vec<T> {
        self.into_iter().flatten().collect()
    }
}
