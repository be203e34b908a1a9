//! Terabytes are announced, and one page comes.

use std::{
    fs::File,
    io::{self, Cursor, Read, Write},
    os::unix::fs::MetadataExt,
    sync::Arc,
    time::Duration,
};

use multifd::{
    ReceiveOptions, Receiver,
    channel::{Stop, Wake},
    ram::{BlockIndex, BlockName, PageBitmap, PageIndex, PageSize},
};
use qemu_stream::{
    Connection,
    format::{
        BlockEntry, BlockList, Configuration, Device, DevicePart, MachineType, SectionId, SectionName, limits,
    },
    incoming::{Expected, Incoming, LeftOut, Loader},
    mapped_ram::{Capture, CaptureOptions, Layout, MappedRamFile, ReadPath, Tail},
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::bounded;

/// A main stream that has all been written, and whose replies nobody reads.
struct Source(Cursor<Vec<u8>>);

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Source {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection for Source {
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn set_read_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// A file that may have any length: other file systems allow 16 TiB.
fn file() -> File {
    memfd_create("machine", MemfdFlags::CLOEXEC).expect("a file").into()
}

fn configuration() -> Configuration {
    Configuration::new(MachineType::new("pc-q35-10.0").expect("a name"))
}

fn list() -> BlockList {
    let entry = BlockEntry::new(BlockName::new("pc.ram").expect("a name"), RAM);
    BlockList::new(vec![entry], PageSize::KIB_4).expect("a list")
}

fn devices() -> DevicePart {
    let name = SectionName::new("timer").expect("a name");
    let timer = Device { name, instance: 0, version: 2, state: vec![7; 24] };
    DevicePart::build(&[timer], 4096, SectionId(2)).expect("devices")
}

/// Header, configuration, the list, one page far inside, the devices.
fn stream() -> Vec<u8> {
    let mut bytes =
        b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    bytes.extend((RAM | 4).to_be_bytes());
    bytes.extend(b"\x06pc.ram");
    bytes.extend(RAM.to_be_bytes());
    let eos = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";
    bytes.extend(eos);
    bytes.extend(b"\x03\0\0\0\x01");
    bytes.extend((PAGE.0 << 12 | 8).to_be_bytes());
    bytes.extend(b"\x06pc.ram");
    bytes.extend([7; 4096]);
    bytes.extend(eos);
    bytes.extend(devices().as_bytes());
    bytes
}

/// An eighth of what is accepted, because a walk over all words takes its time.
const RAM: u64 = limits::RAM_TOTAL / 8;
const PAGE: PageIndex = PageIndex(0x1234_5678);

#[test]
fn terabytes_that_are_announced_and_do_not_come_cost_neither_memory_nor_disk() {
    let received = Arc::new(file());
    bounded("receive", || {
        let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
        let mut layout = None;
        let mut loader = Loader::new(&receiver, Expected::AnyMachine, |plain, list| {
            let made = Layout::new(plain.expect("a configuration"), list, SectionId(1), 0).expect("a layout");
            received.set_len(made.tail_offset()).expect("sparse");
            let blocks = made.ram_blocks(&received, None);
            layout = Some(made);
            blocks
        })
        .left_out(LeftOut::Pages);
        let loaded = Incoming::new(Source(Cursor::new(stream()))).run(&mut loader).expect("loaded");
        let blocks = loader.finish(&loaded).expect("the rest is zero");
        let tail = Tail {
            switchover_start: loaded.switchover_start,
            devices: &loaded.devices,
            about: None,
            base: None,
        };
        layout.expect("made").write_around(&received, &blocks, &tail).expect("written");
    });
    let on_disk = received.metadata().expect("its size").blocks() * 512;
    assert!(on_disk <= 256 << 10, "{on_disk} bytes of disk");

    let opened = bounded("open and read the bitmap", || {
        let opened = MappedRamFile::open(received.try_clone().expect("the same file"), 0).expect("a machine");
        let present = opened.bitmap(BlockIndex(0)).expect("read");
        assert_eq!(present.set_runs().collect::<Vec<_>>(), [(PAGE, 1)]);
        opened
    });
    bounded("blocks to send", || opened.ram_blocks(|_, _| ReadPath::Mapped).expect("mapped"));
    bounded("the pages of the first pass", || {
        // As many as a source has: to send, to put back after a failure, written after the stop.
        let [pending, back, written] =
            [PageBitmap::full, PageBitmap::full, PageBitmap::new].map(|make| make(RAM >> 12));
        assert_eq!(pending.take_words().take(100_000).count(), 100_000);
        assert!(!back.is_empty() && written.is_empty());
    });
    let captured = file();
    bounded("begin a capture", || {
        let copy = captured.try_clone().expect("the same file");
        Capture::of_machine(copy, &opened, &CaptureOptions::new()).expect("laid out")
    });
    let copy = file();
    bounded("write with the caller's bitmap", || {
        let layout = Layout::new(&configuration(), &list(), SectionId(1), 0).expect("a layout");
        let present = opened.bitmap(BlockIndex(0)).expect("read");
        let tail = Tail { switchover_start: true, devices: &devices(), about: None, base: None };
        layout.write(&copy, &tail, |_, _| present.words()).expect("written");
    });
}
