//! A destination that misbehaves on demand.
//!
//! It listens on a real socket, identifies main and the channels by their first bytes, and treats each according to its
//! [`Plan`]: it reads a number of bytes, sends something, then closes, resets, or holds the connection silently until it is
//! dropped. It checks nothing and stores nothing.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::SockRef;

/// How much of a connection is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// This number of bytes.
    Bytes(usize),
    /// Everything, until the source closes or, on main, has sent the description of its devices.
    All,
    /// Like [`All`](Self::All), but this many bytes at a time, with a pause between.
    Slowly(usize),
    /// As [`All`](Self::All), after this time.
    Late(Duration),
    /// Like [`All`](Self::All), but one byte at a time, with a pause between that may be zero.
    Dribbling(Duration),
}

/// What happens to a connection after the reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is closed normally.
    Close,
    /// It is reset.
    Reset,
    /// It is reset after this time.
    ResetAfter(Duration),
    /// Nothing happens until the destination is dropped.
    Hold,
}

/// Which connections it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepts {
    /// All.
    All,
    /// The first connection, main; the others are refused.
    Main,
    /// None: connections wait in the system's queue.
    None,
}

/// What a destination does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which connections it accepts.
    pub accepts: Accepts,
    /// The size of every connection's receive buffer in bytes, as the system rounds it; `None` is the system's default.
    pub receive_buffer: Option<usize>,
    /// How much of main is read.
    pub main: Reads,
    /// What is sent on main after the reads.
    pub says: Vec<u8>,
    /// What happens to main then.
    pub then: Then,
    /// The same of every channel.
    pub channels: (Reads, Then),
    /// A channel, by its id, that is treated differently from the others.
    pub odd_one: Option<(u8, Reads, Then)>,
    /// Whether channels are read only after main has sent its bytes.
    pub says_first: bool,
}

impl Default for Plan {
    /// A destination that behaves correctly.
    fn default() -> Self {
        Self {
            accepts: Accepts::All,
            receive_buffer: None,
            main: Reads::All,
            says: SHUT_0.to_vec(),
            then: Then::Hold,
            channels: (Reads::All, Then::Close),
            odd_one: None,
            says_first: false,
        }
    }
}

/// SHUT with code 0: success.
pub const SHUT_0: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// A running destination. It ends when it is dropped, which must be after its source has ended.
#[derive(Debug)]
pub struct BadDestination {
    address: SocketAddr,
    /// When dropped, it ends all threads that hold a connection.
    hold: Option<Sender<()>>,
    acceptor: Option<JoinHandle<()>>,
    /// Set when it refuses connections.
    refuses: Arc<OnceLock<()>>,
}

impl BadDestination {
    /// Starts it on a free port.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(plan: Plan) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        if let Some(bytes) = plan.receive_buffer {
            // Connections inherit the buffer size of their listener.
            SockRef::from(&listener).set_recv_buffer_size(bytes)?;
        }
        let address = listener.local_addr()?;
        let (hold, held) = channel();
        let refuses = Arc::new(OnceLock::new());
        let acceptor = {
            let refuses = refuses.clone();
            thread::spawn(move || accept(listener, plan, &held, &refuses))
        };
        Ok(Self { address, hold: Some(hold), acceptor: Some(acceptor), refuses })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it refuses connections. A destination that [accepts only main](Accepts::Main) does so when main is
    /// connected.
    pub fn wait_refusing(&self) {
        self.refuses.wait();
    }
}

impl Drop for BadDestination {
    fn drop(&mut self) {
        drop(self.hold.take());
        // The acceptor waits for a connection, or for the end.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            // A thread that panicked has reported it.
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: TcpListener, plan: Plan, held: &Receiver<()>, refuses: &OnceLock<()>) {
    if plan.accepts == Accepts::None {
        // Returns an error when the other end is dropped.
        let _ = held.recv();
        return;
    }
    let plan = Arc::new((plan, OnceLock::new()));
    let mut served = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        if held.try_recv() == Err(TryRecvError::Disconnected) {
            break;
        }
        let serving = plan.clone();
        served.push(thread::spawn(move || serve(stream, &serving.0, &serving.1)));
        if plan.0.accepts == Accepts::Main {
            drop(listener);
            // Nothing else sets it.
            let _ = refuses.set(());
            let _ = held.recv();
            break;
        }
    }
    for thread in served {
        // Connections that it still holds are closed here.
        let _ = thread.join();
    }
}

/// Serves one connection. Its errors mean that the source has closed. Returns a connection that must be held. `said` is
/// set when main has sent its bytes.
fn serve(mut stream: TcpStream, plan: &Plan, said: &OnceLock<()>) -> Option<TcpStream> {
    let mut seen = vec![0; 4];
    stream.read_exact(&mut seen).ok()?;
    let main = seen == b"QEVM";
    let (mut reads, mut then) = if main { (plan.main, plan.then) } else { plan.channels };
    if !main && plan.says_first {
        said.wait();
    }
    if let (false, Some((id, its_reads, its_then))) = (main, plan.odd_one) {
        seen.resize(CHANNEL_ID + 1, 0);
        stream.read_exact(&mut seen[4..]).ok()?;
        if seen[CHANNEL_ID] == id {
            (reads, then) = (its_reads, its_then);
        }
    }
    read(&mut stream, &mut seen, reads, main);
    if main {
        let _ = stream.write_all(&plan.says);
        let _ = said.set(());
    }
    match then {
        Then::Close => None,
        Then::Reset => reset(&stream),
        Then::ResetAfter(time) => {
            thread::sleep(time);
            reset(&stream)
        }
        Then::Hold => Some(stream),
    }
}

/// Makes closing the connection a reset.
fn reset(stream: &TcpStream) -> Option<TcpStream> {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    None
}

fn read(stream: &mut TcpStream, seen: &mut Vec<u8>, reads: Reads, main: bool) {
    let (most, step, pause) = match reads {
        Reads::Bytes(most) => (most, 64 << 10, None),
        Reads::All => (usize::MAX, 64 << 10, None),
        Reads::Late(time) => {
            thread::sleep(time);
            (usize::MAX, 64 << 10, None)
        }
        Reads::Slowly(step) => (usize::MAX, step, Some(Duration::from_millis(20))),
        Reads::Dribbling(pause) => (usize::MAX, 1, Some(pause).filter(|pause| !pause.is_zero())),
    };
    let (mut had, mut asked) = (seen.len(), 0);
    let mut bytes = vec![0; step];
    while had < most && !(main && is_whole(seen)) {
        let step = step.min(most - had);
        let Ok(some @ 1..) = stream.read(&mut bytes[..step]) else { return };
        had += some;
        if main {
            seen.extend(&bytes[..some]);
            asked = answer(stream, seen, asked);
        }
        if let Some(pause) = pause {
            thread::sleep(pause);
        }
    }
}

/// Answers every PING after the first `asked` bytes, except those that open the return path. Returns how many bytes
/// were processed.
fn answer(stream: &mut TcpStream, seen: &[u8], asked: usize) -> usize {
    let mut at = asked;
    while let Some(command) = seen.get(at..at + PING.len() + 4) {
        at += 1;
        if let Some(value) = command.strip_prefix(&PING[..]).filter(|value| {
            *value != [0, 0, 0, 1] && !value.starts_with(b"mfd") && !value.starts_with(b"mfg")
        }) {
            let _ = stream.write_all(&[&[0, 2, 0, 4], value].concat());
        }
    }
    at
}

/// Whether a main stream is complete: EOF, and a complete description.
fn is_whole(stream: &[u8]) -> bool {
    let mut ends = stream
        .windows(7)
        .enumerate()
        .filter(|(_, window)| window.starts_with(b"\0\x06") && window[6] == b'{');
    ends.any(|(at, window)| {
        let length = window[2..6].iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        at + 6 + length == stream.len()
    })
}

/// The command PING, before its value.
const PING: [u8; 5] = [8, 0, 2, 0, 4];
/// The offset of the id in a channel's initial packet.
const CHANNEL_ID: usize = 24;
