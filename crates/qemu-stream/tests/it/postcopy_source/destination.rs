//! A destination of post-copy that reads the stream by itself, checks its order, and misbehaves where a test wants it to.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{Arc, Mutex, mpsc::Receiver},
    thread::{self, JoinHandle},
    time::Duration,
};

use multifd::{
    channel::Stop,
    ram::{BlockIndex, BlockName, PageBitmap, PageIndex, PageSize},
};
use qemu_stream::{
    error::{Error, StreamKind},
    format::{
        BlockList, Command, CurrentBlock, Message, Reader, Record, Section, decode_footer, decode_header,
    },
};

/// The places at which a destination may misbehave, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Point {
    /// It has the block list.
    Opened,
    /// It has forgotten pages; PONG 2 comes next.
    Discarded,
    /// PONG 2 was sent.
    Ready,
    /// It has the package; PONG 3 comes next.
    Packaged,
    /// PONG 3 was sent.
    Loaded,
    /// It has half of the pages.
    Half,
    /// It has END and EOF; SHUT comes next.
    Ended,
    /// SHUT was sent.
    Shut,
    /// It was asked for the first bitmap, in a resumed migration.
    Asked,
    /// RESUME has arrived; RESUME_ACK comes next.
    Resumed,
}

/// What it does at a point.
#[derive(Clone, Debug)]
pub(super) enum Act {
    /// It sends this and continues.
    Say(Vec<u8>),
    /// A thread sends this, while it continues.
    SayMeanwhile(Vec<u8>),
    /// It sends this instead of what comes next, and continues.
    Instead(Vec<u8>),
    /// It closes its side, and reads until the source closes.
    Close,
    /// It sends this, closes its side, and reads until the source closes.
    SayAndClose(Vec<u8>),
    /// It resets main.
    Reset,
    /// It does nothing until the source has ended.
    Silence,
    /// It reads everything and replies to nothing.
    Deaf,
    /// The source is cancelled after this time.
    Cancel(Stop, Duration),
    /// It closes the connection for requests, and continues.
    ClosePreempt,
}

/// How a page came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Main,
    Preempt,
}

/// A page that arrived: the connection, where it belongs, and its bytes; none for ZERO.
pub(super) type Arrived = (Lane, BlockIndex, u64, Option<Vec<u8>>);

/// Where it listens.
pub(super) enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener, tempfile::TempDir),
}

impl Listening {
    pub(super) fn tcp() -> Self {
        Self::Tcp(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub(super) fn unix() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::Unix(UnixListener::bind(folder.path().join("socket")).unwrap(), folder)
    }

    pub(super) fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => format!("tcp:{}", listener.local_addr().unwrap()),
            Self::Unix(_, folder) => {
                let path: PathBuf = folder.path().join("socket");
                format!("unix:{}", path.display())
            }
        }
    }

    fn accept(&self) -> io::Result<OwnedFd> {
        Ok(match self {
            Self::Tcp(listener) => listener.accept()?.0.into(),
            Self::Unix(listener, _) => listener.accept()?.0.into(),
        })
    }

    /// Ends a wait in `accept`.
    pub(super) fn poke(&self) {
        match self {
            Self::Tcp(listener) => drop(TcpStream::connect(listener.local_addr().unwrap())),
            Self::Unix(_, folder) => drop(UnixStream::connect(folder.path().join("socket"))),
        }
    }
}

/// What a destination does.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) acts: Vec<(Point, Act)>,
    /// Whether it has a connection for requests, and accepts it.
    pub(super) preempt: bool,
    /// Whether it sends no SHUT of its own.
    pub(super) no_shut: bool,
    /// The pages that it has already, of a resumed migration: one in so many. Without, it is a new migration.
    pub(super) has: Option<usize>,
}

impl Plan {
    pub(super) fn good() -> Self {
        Self { acts: Vec::new(), preempt: false, no_shut: false, has: None }
    }

    pub(super) fn at(point: Point, act: Act) -> Self {
        Self::good().then(point, act)
    }

    pub(super) fn then(mut self, point: Point, act: Act) -> Self {
        self.acts.push((point, act));
        self
    }
}

/// A destination at work.
pub(super) struct Destination {
    main: Reader<File>,
    /// The descriptor of main.
    socket: File,
    preempt: Option<File>,
    pub(super) list: BlockList,
    pub(super) arrived: Arc<Mutex<Vec<Arrived>>>,
    /// What the DISCARDs contained: block, first byte, length.
    pub(super) discarded: Vec<(BlockName, u64, u64)>,
    plan: Plan,
    ended: Receiver<()>,
    passed: HashSet<Point>,
    /// A thread that sends something. What follows is sent after it.
    meanwhile: Option<JoinHandle<io::Result<()>>>,
}

/// Why it continues no further.
#[derive(Debug)]
pub(super) enum End {
    /// It was told to.
    Planned,
    /// The source has closed, or broken the rules.
    Failed(#[expect(dead_code, reason = "it is shown")] Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        let at = qemu_stream::error::Place { stream: StreamKind::ReturnPath, offset: 0 };
        Self::Failed(Error::Io { at, doing: "write", source: error })
    }
}

/// Encodes messages.
pub(super) fn said(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut bytes));
    bytes
}

/// A request for pages.
pub(super) fn request(block: Option<&str>, start: u64, length: u32) -> Vec<u8> {
    let block = block.map(|name| BlockName::new(name).unwrap());
    said(&[Message::ReqPages { block, start, length }])
}

impl Destination {
    /// Accepts a source.
    pub(super) fn accept(
        listening: &Listening,
        list: BlockList,
        plan: Plan,
        ended: Receiver<()>,
    ) -> Result<Self, End> {
        let socket = File::from(listening.accept()?);
        let preempt = if plan.preempt { Some(File::from(listening.accept()?)) } else { None };
        let main = Reader::new(socket.try_clone()?, StreamKind::Main);
        let (arrived, discarded, passed) = (Arc::default(), Vec::new(), HashSet::new());
        Ok(Self { main, socket, preempt, list, arrived, discarded, plan, ended, passed, meanwhile: None })
    }

    fn say(&mut self, bytes: &[u8]) -> Result<(), End> {
        if let Some(thread) = self.meanwhile.take() {
            thread.join().unwrap()?;
        }
        Ok(self.socket.write_all(bytes)?)
    }

    /// Serves the source to its end. Returns whether everything has arrived.
    pub(super) fn serve(&mut self) -> Result<(), End> {
        let preempt = self.preempt.as_ref().map(File::try_clone).transpose()?;
        let (list, arrived) = (self.list.clone(), self.arrived.clone());
        thread::scope(|scope| {
            let reads = preempt.map(|preempt| {
                scope.spawn(move || {
                    let (mut current, mut r) =
                        (CurrentBlock::default(), Reader::new(preempt, StreamKind::Main));
                    while record(&mut r, &list, &mut current, Lane::Preempt, &arrived)? {}
                    // It stays open until SHUT was sent.
                    Ok::<_, Error>(r)
                })
            });
            let served = self.main();
            if served.is_err()
                && let Some(preempt) = &self.preempt
            {
                let _ = rustix::net::shutdown(preempt, rustix::net::Shutdown::Both);
            }
            let read = reads.map(|thread| thread.join().unwrap());
            served?;
            if let Some(read) = read {
                read.expect("bare records, then EOS");
            }
            Ok(())
        })
    }

    fn main(&mut self) -> Result<(), End> {
        let mut current = CurrentBlock::default();
        if self.plan.has.is_none() {
            decode_header(&mut self.main)?;
        }
        let (mut advised, mut packaged) = (false, false);
        loop {
            match Section::decode(&mut self.main)? {
                Section::Command(Command::OpenReturnPath | Command::SwitchoverStart) => {}
                Section::Command(Command::Ping(2)) => {
                    self.pass(Point::Discarded, &said(&[Message::Pong(2)]))?;
                    self.pass(Point::Ready, &[])?;
                }
                // Nobody waits for the reply.
                Section::Command(Command::Ping(4)) if self.meanwhile.is_some() => {}
                Section::Command(Command::Ping(number)) => self.say(&said(&[Message::Pong(number)]))?,
                Section::Command(Command::PostcopyAdvise(sizes)) => {
                    assert_eq!(sizes.expect("sizes").target, 0x1000);
                    advised = true;
                }
                Section::Command(Command::PostcopyRamDiscard { block, ranges }) => {
                    assert!(advised && !packaged);
                    self.discarded.extend(ranges.iter().map(|range| (block.clone(), range.0, range.1)));
                }
                Section::Command(Command::Packaged(length)) => {
                    self.main.bytes(length.into(), 1 << 20, "the package")?;
                    packaged = true;
                    self.pass(Point::Packaged, &said(&[Message::Pong(3)]))?;
                    self.pass(Point::Loaded, &[])?;
                }
                Section::Command(Command::RecvBitmap(name)) => {
                    let (name, bitmap) = self.bitmap(name);
                    let message = said(&[Message::RecvBitmap { block: name, bitmap }]);
                    self.pass_or(Point::Asked, &message)?;
                }
                Section::Command(Command::PostcopyResume) => {
                    self.pass(Point::Resumed, &said(&[Message::ResumeAck]))?;
                }
                Section::Start(head) => {
                    let shared = self.list.entries().iter().any(|entry| entry.address.is_some());
                    let list = BlockList::decode(&mut self.main, PageSize::KIB_4, shared, advised)?;
                    assert_eq!(list.total(), self.list.total());
                    let arrived = self.arrived.clone();
                    assert!(!record(&mut self.main, &list, &mut current, Lane::Main, &arrived)?);
                    decode_footer(head.id, &mut self.main)?;
                    self.pass(Point::Opened, &[])?;
                }
                Section::Part(id) | Section::End(id) => {
                    let arrived = self.arrived.clone();
                    while record(&mut self.main, &self.list, &mut current, Lane::Main, &arrived)? {}
                    decode_footer(id, &mut self.main)?;
                    let half = self.list.total() >> 13;
                    let has = arrived.lock().unwrap().len() as u64;
                    if !self.passed.contains(&Point::Half) && has >= half {
                        self.pass(Point::Half, &[])?;
                    }
                }
                Section::Eof => {
                    let shut = if self.plan.no_shut { Vec::new() } else { said(&[Message::Shut(0)]) };
                    self.pass(Point::Ended, &shut)?;
                    self.pass(Point::Shut, &[])?;
                    return Ok(());
                }
                other => panic!("{} has no place in post-copy", other.name()),
            }
        }
    }

    /// The bitmap of the pages that it has.
    fn bitmap(&self, name: BlockName) -> (BlockName, Vec<u8>) {
        let block = self.list.position(&name).expect("a block of the machine");
        let pages = self.list.entry(block).expect("there").used_length >> 12;
        let bits = PageBitmap::new(pages);
        let every = self.plan.has.expect("resumed");
        (0..pages).step_by(every).for_each(|page| bits.set_run(PageIndex(page), 1));
        let bitmap = bits.words().flat_map(u64::to_le_bytes).collect();
        (name, bitmap)
    }

    /// Sends `next`, or does what is planned for this point. Only the first time.
    fn pass(&mut self, point: Point, next: &[u8]) -> Result<(), End> {
        if !self.passed.insert(point) {
            return self.say(next);
        }
        self.pass_or(point, next)
    }

    fn pass_or(&mut self, point: Point, next: &[u8]) -> Result<(), End> {
        self.passed.insert(point);
        let acts = self.plan.acts.clone();
        let mut instead = next.is_empty();
        for (_, act) in acts.into_iter().filter(|(at, _)| *at == point) {
            match act {
                Act::Say(bytes) => self.say(&bytes)?,
                Act::SayMeanwhile(bytes) => {
                    let mut socket = self.socket.try_clone()?;
                    // It ends with the connection.
                    self.meanwhile = Some(thread::spawn(move || socket.write_all(&bytes)));
                }
                Act::Instead(bytes) => {
                    self.say(&bytes)?;
                    instead = true;
                }
                Act::Close => return Err(self.close(&[])),
                Act::SayAndClose(bytes) => return Err(self.close(&bytes)),
                Act::Reset => {
                    rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO))
                        .map_err(io::Error::from)?;
                    // The connection is reset when its last descriptor is closed.
                    let gone = File::open("/dev/null")?;
                    self.main = Reader::new(gone.try_clone()?, StreamKind::Main);
                    self.socket = gone;
                    return Err(End::Planned);
                }
                Act::Silence => {
                    let _ = self.ended.recv();
                    return Err(End::Planned);
                }
                Act::Deaf => {
                    self.drain();
                    return Err(End::Planned);
                }
                Act::Cancel(stop, after) => {
                    thread::sleep(after);
                    stop.cancel();
                }
                Act::ClosePreempt => {
                    let preempt = self.preempt.as_ref().expect("there");
                    rustix::net::shutdown(preempt, rustix::net::Shutdown::Both).map_err(io::Error::from)?;
                }
            }
        }
        if instead { Ok(()) } else { self.say(next) }
    }

    fn close(&mut self, last: &[u8]) -> End {
        let _ = self.say(last);
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        self.drain();
        End::Planned
    }

    fn drain(&mut self) {
        let _ = io::copy(&mut &self.socket, &mut io::sink());
    }
}

/// Takes a record of pages; `false` at EOS.
fn record(
    r: &mut Reader<File>,
    list: &BlockList,
    current: &mut CurrentBlock,
    lane: Lane,
    arrived: &Mutex<Vec<Arrived>>,
) -> Result<bool, Error> {
    let (block, page, bytes) = match Record::decode(r, list, current)? {
        Record::Eos => return Ok(false),
        Record::Zero(block, page) => (block, page, None),
        Record::Page(block, page) => (block, page, Some(r.bytes(4096, 4096, "a page")?)),
        other => panic!("{other:?} has no place in post-copy"),
    };
    arrived.lock().unwrap().push((lane, block, page.0, bytes));
    Ok(true)
}
