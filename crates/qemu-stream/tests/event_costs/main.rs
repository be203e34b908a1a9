//! What it costs to read and write a main stream event by event, counted by the allocator and by the connection: nothing for a
//! page but its bytes, and no more memory than came, whatever a stream announces.
//!
//! A program of its own with one test, so that nobody else allocates meanwhile.
//!
//! UNSAFETY: an allocator is an unsafe trait; this one counts and has the system's do the work.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::{self, Read},
    sync::atomic::{AtomicUsize, Ordering},
};

use multifd::ram::{BlockIndex, BlockName, PageIndex, PageSize};
use qemu_stream::{
    format::{
        BlockEntry, BlockList, Configuration, Device, DevicePart, MachineType, Reader, SectionId,
        SectionName, SyncMode,
    },
    incoming::{Event, Events, SyncMark},
    outgoing::EventWriter,
};

struct Counting;

/// All of one thread.
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator as it came, and its answer as it comes; that `realloc` of the trait
// allocates, copies and frees by these two keeps the count right.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        let live = LIVE.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Counts its reads.
struct Counted<'a>(&'a [u8], usize);

impl Read for Counted<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.1 += 1;
        self.0.read(into)
    }
}

const PAGES: u64 = 4096;

/// A machine with all of its pages on main, normal and zero ones in turns.
fn whole() -> Vec<u8> {
    let configuration = Configuration::new(MachineType::new("pc-q35-10.0").expect("valid"));
    let ram = BlockEntry::new(BlockName::new("pc.ram").expect("valid"), PAGES << 12);
    let blocks = BlockList::new(vec![ram], PageSize::KIB_4).expect("valid");
    let name = SectionName::new("vcpu").expect("valid");
    let devices = [Device { name, instance: 0, version: 1, state: vec![7; 5000] }];
    let devices = DevicePart::build(&devices, 4096, SectionId(2)).expect("valid");
    let mut out = EventWriter::new(Vec::new());
    let mut write = |event: &Event<'_>| out.write(event).expect("valid");
    write(&Event::Configuration(Some(&configuration)));
    write(&Event::Blocks { section: SectionId(1), blocks: &blocks });
    write(&Event::SyncMode(SyncMode::Legacy));
    let end = [Event::SyncPoint(SyncMark::Eos), Event::Eos, Event::SectionEnd { footer: true }];
    end.iter().for_each(&mut write);
    write(&Event::Pass { last: true });
    for page in 0..PAGES {
        let (block, page) = (BlockIndex(0), PageIndex(page));
        write(&if page.0 % 2 == 0 {
            Event::Page { block, page, bytes: &[9; 4096] }
        } else {
            Event::ZeroPage { block, page }
        });
    }
    end.iter().for_each(&mut write);
    write(&Event::EndOfRam);
    write(&Event::End(Box::new(devices)));
    out.into_inner()
}

/// Reads all, and writes it to nowhere: allocations since the second page up to the last, and calls of `read`.
fn costs(stream: &[u8]) -> (usize, usize) {
    let mut events = Events::new(Counted(stream, 0));
    let mut copy = EventWriter::new(io::sink());
    let (mut first, mut last, mut pages) = (0, 0, 0);
    loop {
        let event = events.next().expect("valid");
        copy.write(&event).expect("valid");
        match event {
            Event::Page { .. } | Event::ZeroPage { .. } => {
                pages += 1;
                last = ALLOCATIONS.load(Ordering::SeqCst);
                if pages == 2 {
                    first = last;
                }
            }
            Event::End(_) => {
                assert_eq!(pages, PAGES);
                return (last - first, events.get_ref().1);
            }
            _ => {}
        }
    }
}

/// Memory that was live at one time while the stream was read, beside the reader's buffer.
fn most_live(stream: &[u8]) -> usize {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let mut events = Events::new(stream).suppress_vmdesc(true);
    while events.next().is_ok() {}
    (PEAK.load(Ordering::SeqCst) - before).saturating_sub(Reader::<&[u8]>::CAPACITY)
}

#[test]
fn a_page_costs_its_bytes_and_memory_grows_with_what_came() {
    let stream = whole();
    let (allocations, reads) = costs(&stream);
    assert_eq!(allocations, 0, "between the second page and the last");
    // A full buffer each, less what is left of a page that is not all there.
    let most = stream.len() / (Reader::<&[u8]>::CAPACITY - 4096) + 2;
    assert!(reads <= most, "{reads} reads of {} bytes", stream.len());

    let mut random = fastrand::Rng::with_seed(7);
    let small: Vec<u8> = {
        // Two pages and the devices.
        let (from, to) = (stream.len() - 6000, stream.len());
        let first = stream.windows(5).position(|window| window == [3, 0, 0, 0, 1]).expect("valid") + 5;
        [&stream[..first + 4120], &stream[from - 4200..to]].concat()
    };
    for _ in 0..20_000 {
        let mut bytes = small.clone();
        for _ in 0..random.usize(0..4) {
            let at = random.usize(..bytes.len().min(200));
            bytes[at] = random.u8(..);
        }
        bytes.truncate(random.usize(..2 * bytes.len()));
        let live = most_live(&bytes);
        // What came is kept once, looked at once more when it may be the end, and a vector grows by doubling.
        assert!(live <= 16 * bytes.len() + (8 << 10), "{live} for {} bytes: {bytes:02x?}", bytes.len());
    }
    // Lengths that promise much.
    for announced in [
        &b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"[..],
        b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\x40\0\0\0\0\x04\x01a\0\0\x3f\xff\xff\xff\xf0\0",
        b"QEVM\0\0\0\x03\x08\0\x06\xff\xff\0\x01a\0",
        b"QEVM\0\0\0\x03\x04\0\0\0\x01\x01d\0\0\0\0\0\0\0\x01",
    ] {
        let live = most_live(announced);
        assert!(live <= 16 << 10, "{live} for {announced:02x?}");
    }
}
