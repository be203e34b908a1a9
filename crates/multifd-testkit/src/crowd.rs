//! Hosts that connect, say nothing, and connect again when they are dropped, to keep others out.

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

/// Where a crowd connects to.
#[derive(Clone, Debug)]
pub enum Target {
    /// From this address, so that it counts as another host.
    Tcp(IpAddr, SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl Target {
    fn connect(&self) -> io::Result<Socket> {
        let socket = match self {
            Self::Tcp(from, to) => {
                let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
                socket.bind(&SocketAddr::from((*from, 0)).into())?;
                socket.connect_timeout(&(*to).into(), Duration::from_millis(200))?;
                socket
            }
            Self::Unix(path) => UnixStream::connect(path)?.into(),
        };
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

/// Silent connections, which are renewed until it is dropped.
#[derive(Debug)]
pub struct Crowd {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    ends: AtomicBool,
    /// Connections that are open at present.
    open: AtomicUsize,
    /// The most that were open at once, after each round of renewals.
    most: AtomicUsize,
    /// Connections made so far.
    made: AtomicU64,
}

impl Crowd {
    /// Keeps `size` connections to `target`, as far as they stay open.
    ///
    /// # Errors
    /// If the system refuses the descriptors, or the thread.
    pub fn start(target: Target, size: usize) -> io::Result<Self> {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
        let counts = Arc::new(Counts::default());
        let thread = thread::Builder::new().name("crowd".into()).spawn({
            let counts = counts.clone();
            move || run(&target, size, &counts)
        })?;
        Ok(Self { counts, thread: Some(thread) })
    }

    /// Waits until it has made this number of connections; `false` if that does not happen within `limit`.
    pub fn has_made(&self, connections: u64, limit: Duration) -> bool {
        let begun = Instant::now();
        while self.made() < connections {
            if begun.elapsed() > limit {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// The number of connections made so far.
    pub fn made(&self) -> u64 {
        self.counts.made.load(Ordering::Relaxed)
    }

    /// The greatest number of connections that were open at once, as seen from this end.
    pub fn most_open(&self) -> usize {
        self.counts.most.load(Ordering::Relaxed)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.counts.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(target: &Target, size: usize, counts: &Counts) {
    let mut all: Vec<Socket> = Vec::new();
    while !counts.ends.load(Ordering::Relaxed) {
        all.retain(is_open);
        counts.open.store(all.len(), Ordering::Relaxed);
        counts.most.fetch_max(all.len(), Ordering::Relaxed);
        for _ in all.len()..size {
            // Refused while there is no listener, or when its queue is full.
            let Ok(socket) = target.connect() else { break };
            all.push(socket);
            counts.made.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether the other end has not dropped it.
fn is_open(mut socket: &Socket) -> bool {
    matches!(socket.read(&mut [0; 64]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}
