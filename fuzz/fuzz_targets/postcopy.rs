//! What a destination of post-copy sends to its source, over a socket: to one that starts a guest, and to one that resumes.
//!
//! The input is a byte of options (1: resume; 2: a connection for requests; 4: host pages of four pages) and a row of pieces: two
//! bytes of length, so many bytes. The first piece is sent when the source has sent something, each other one when the source
//! has been silent for a moment. Then the connection is closed.
#![no_main]

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::{Arc, Mutex, OnceLock},
    thread,
    time::Duration,
};

use multifd::{
    channel::{Address, Connect, Context, Link, Stop},
    ram::{BlockName, PageIndex, PageSize},
};
use multifd_fuzz::shown;
use qemu_stream::{
    format::{BlockEntry, BlockList, Configuration, DevicePart, MachineType, SectionId},
    mapped_ram::{Layout, MappedRamFile, ReadPath, Tail},
    outgoing::postcopy::{GuestAt, PostcopyOptions, PostcopySource},
};

const BLOCKS: [(&str, u64); 2] = [("a", 100), ("b", 3)];
const PAGES: u64 = 103;
const LIMIT: Duration = Duration::from_millis(100);
const SILENCE: Duration = Duration::from_millis(5);
/// More of them take longer than a fuzzer has patience.
const PIECES: usize = 4;

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some((options, pieces)) = bytes.split_first() else { return };
    let (resumes, preempt, host_pages) = (options & 1 != 0, options & 2 != 0, options & 4 != 0);
    let count = if preempt { 2 } else { 1 };
    let pairs = (0..count).map(|_| UnixStream::pair().expect("sockets"));
    let (near, far): (Vec<_>, Vec<_>) = pairs.unzip();
    let options = PostcopyOptions::new().stall_timeout(Some(LIMIT)).end_timeout(Some(LIMIT)).preempt(preempt);
    let options = if host_pages { options.host_page_size(0x4000) } else { options };
    let file = file();
    let blocks = file.ram_blocks(|_, _| ReadPath::Cached).expect("blocks");
    let mut source = PostcopySource::of_file(file, Arc::new(blocks), options).expect("a source");
    let connector = Sockets(Mutex::new(near));
    let sent = thread::scope(|scope| {
        for (index, socket) in far.iter().enumerate() {
            scope.spawn(move || play(socket, if index == 0 { pieces } else { &[] }, index == 0));
        }
        let stop = Stop::new();
        let sent = if resumes { source.resume(&connector, &stop) } else { source.start(&connector, &stop) };
        // The threads end with their sockets.
        for socket in &far {
            let _ = socket.shutdown(Shutdown::Both);
        }
        sent
    });
    let at = sent.as_ref().err().map(|failed| failed.guest);
    assert!(!resumes || at.is_none_or(|guest| guest == GuestAt::Destination), "it has been started before");
    if shown(sent).is_some() && !resumes {
        let info = source.progress().info();
        assert_eq!(info.normal + info.zero, PAGES, "a success means that every page was sent, once");
    }
});

/// Plays a destination.
fn play(mut socket: &UnixStream, mut pieces: &[u8], is_main: bool) {
    let mut left = if is_main { PIECES } else { 0 };
    let mut next = |left: &mut usize| {
        let (&length, rest) = pieces.split_first_chunk().filter(|_| *left > 0)?;
        let (piece, rest) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(length))));
        (pieces, *left) = (rest, *left - 1);
        Some(piece)
    };
    socket.set_read_timeout(is_main.then_some(SILENCE)).expect("set");
    let (mut buffer, mut begun) = ([0; 64 << 10], false);
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) if begun || !is_main => continue,
            Ok(_) => begun = true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !begun => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        match next(&mut left) {
            Some(piece) => _ = socket.write_all(piece),
            None => _ = socket.shutdown(Shutdown::Write),
        }
    }
}

/// A machine with a page in three.
fn file() -> &'static MappedRamFile {
    static FILE: OnceLock<MappedRamFile> = OnceLock::new();
    FILE.get_or_init(|| {
        let machine = Configuration::new(MachineType::new("pc-q35-10.0").expect("a name"));
        let entry = |(name, pages)| BlockEntry::new(BlockName::new(name).expect("a name"), pages << 12);
        let blocks = BlockList::new(BLOCKS.map(entry).to_vec(), PageSize::KIB_4).expect("a list");
        let layout = Layout::new(&machine, &blocks, SectionId(1), 0).expect("a layout");
        let file = multifd_fuzz::file();
        for place in layout.places() {
            for page in (0..place.pages()).step_by(3) {
                let at = place.page_offset(PageIndex(page)).expect("a page");
                file.write_all_at(&[7; 4096], at).expect("written");
            }
        }
        let devices = DevicePart::build(&[], 4096, SectionId(2)).expect("devices");
        let tail = Tail { switchover_start: true, devices: &devices, about: None, base: None };
        let words = |pages: u64| {
            let bit = |word: u64, bit: u64| word * 64 + bit < pages && (word * 64 + bit).is_multiple_of(3);
            let word = move |word| (0..64).filter(|at| bit(word, *at)).fold(0, |bits, at| bits | 1 << at);
            (0..pages.div_ceil(64)).map(word).collect::<Vec<u64>>()
        };
        layout.write(&file, &tail, |_, place| words(place.pages())).expect("written");
        MappedRamFile::open(file, 0).expect("a machine")
    })
}

/// Hands out one end of each pair.
struct Sockets(Mutex<Vec<UnixStream>>);

impl Connect for Sockets {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let mut sockets = self.0.lock().expect("whole");
        if sockets.is_empty() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        // The connection is a copy of the descriptor.
        Address::Fd(sockets.remove(0).as_raw_fd()).connect(context)
    }

    fn target(&self) -> String {
        "a socket".to_owned()
    }
}
