//! A destination that misbehaves on demand.
//!
//! It listens on a real socket, takes main and the channels by their first bytes, and does with each what its [`Plan`]
//! says: reads so much, says something, then closes, resets, or holds the connection without a word until it is dropped. It
//! checks nothing and keeps nothing.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{Receiver, Sender, TryRecvError, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::SockRef;

/// How much of a connection is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// So many bytes.
    Bytes(usize),
    /// All that comes, until the source closes or, on main, has sent the description of its devices.
    All,
    /// As [`All`](Self::All), but this many bytes at a time, with a moment between.
    Slowly(usize),
}

/// What becomes of a connection then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is closed in order.
    Close,
    /// It is reset.
    Reset,
    /// Nothing, until the destination is dropped.
    Hold,
}

/// What a destination does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Whether it takes connections at all; otherwise they wait in the system's queue.
    pub accepts: bool,
    /// How much of main is read.
    pub main: Reads,
    /// What is said on main then.
    pub says: Vec<u8>,
    /// What becomes of main.
    pub then: Then,
    /// The same of every channel.
    pub channels: (Reads, Then),
}

impl Default for Plan {
    /// A destination that does all it should.
    fn default() -> Self {
        Self {
            accepts: true,
            main: Reads::All,
            says: SHUT_0.to_vec(),
            then: Then::Hold,
            channels: (Reads::All, Then::Close),
        }
    }
}

/// SHUT with code 0: all is well.
pub const SHUT_0: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// A destination under way; ends when it is dropped, which is to be after its source has ended.
#[derive(Debug)]
pub struct BadDestination {
    address: SocketAddr,
    /// Dropped, it ends all who hold a connection.
    hold: Option<Sender<()>>,
    acceptor: Option<JoinHandle<()>>,
}

impl BadDestination {
    /// Starts it at a free port.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn start(plan: Plan) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (hold, held) = channel();
        let acceptor = thread::spawn(move || accept(&listener, &plan, &held));
        Ok(Self { address, hold: Some(hold), acceptor: Some(acceptor) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for BadDestination {
    fn drop(&mut self) {
        drop(self.hold.take());
        // The acceptor waits for a connection, or for the end.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            // One that panicked has told so.
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, plan: &Plan, held: &Receiver<()>) {
    if !plan.accepts {
        // Ends with an error when the other end is dropped.
        let _ = held.recv();
        return;
    }
    let mut served = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        if held.try_recv() == Err(TryRecvError::Disconnected) {
            break;
        }
        let plan = plan.clone();
        served.push(thread::spawn(move || serve(stream, &plan)));
    }
    for thread in served {
        // What it still holds is closed here.
        let _ = thread.join();
    }
}

/// Its errors are those of a source that has gone. Gives back a connection that is to be held.
fn serve(mut stream: TcpStream, plan: &Plan) -> Option<TcpStream> {
    let mut seen = vec![0; 4];
    stream.read_exact(&mut seen).ok()?;
    let main = seen == b"QEVM";
    let (reads, then) = if main { (plan.main, plan.then) } else { plan.channels };
    read(&mut stream, &mut seen, reads, main);
    if main {
        let _ = stream.write_all(&plan.says);
    }
    match then {
        Then::Close => None,
        Then::Reset => {
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            None
        }
        Then::Hold => Some(stream),
    }
}

fn read(stream: &mut TcpStream, seen: &mut Vec<u8>, reads: Reads, main: bool) {
    let (most, step) = match reads {
        Reads::Bytes(most) => (most, 64 << 10),
        Reads::All => (usize::MAX, 64 << 10),
        Reads::Slowly(step) => (usize::MAX, step),
    };
    let mut had = seen.len();
    let mut bytes = vec![0; step];
    while had < most && !(main && is_whole(seen)) {
        let step = step.min(most - had);
        let Ok(some @ 1..) = stream.read(&mut bytes[..step]) else { return };
        had += some;
        if main {
            seen.extend(&bytes[..some]);
        }
        if let Reads::Slowly(_) = reads {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether a main stream has come to its end: EOF, and a description that is all here.
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
