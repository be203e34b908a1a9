//! A TCP proxy in user space: accepts at once, and connects to its target later.
//!
//! A source before it considers itself connected as soon as the proxy has accepted. The proxy connects the first
//! connection at once and each further one after a delay, so main's bytes arrive before the channels do. A connection
//! uses one thread for each direction; each ends when its ends close. One connection may break on the way.

use std::{
    io::{self, Read},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, sleep, spawn},
    time::Duration,
};

/// The proxy. Its drop shuts its connections down.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

/// Where a connection breaks.
#[derive(Clone, Copy, Debug)]
struct Break {
    /// Connections are counted from 0 as they come: main is the first one.
    number: usize,
    /// Bytes from the source that pass before.
    after: u64,
}

#[derive(Debug, Default)]
struct Shared {
    ended: AtomicBool,
    breaks: Option<Break>,
    has_broken: AtomicBool,
    /// Both ends of each connection, for the drop.
    sockets: Mutex<Vec<TcpStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Proxy {
    /// Starts a proxy to `target`, which delays its second, third, … connection to the target by `delays`. The last
    /// delay applies to all further connections.
    ///
    /// # Errors
    /// If the system refuses a port.
    pub fn start(target: SocketAddr, delays: Vec<Duration>) -> io::Result<Self> {
        Self::start_with(target, delays, Shared::default())
    }

    /// Starts a proxy to `target` without delays, whose connection `number` breaks when `after` bytes of its source have passed: both
    /// sides find it closed, and what else is on its way is lost. Connections are counted from 0 as they come: main is the first one.
    ///
    /// # Errors
    /// If the system refuses a port.
    pub fn breaking(target: SocketAddr, number: usize, after: u64) -> io::Result<Self> {
        let breaks = Some(Break { number, after });
        Self::start_with(target, Vec::new(), Shared { breaks, ..Shared::default() })
    }

    fn start_with(target: SocketAddr, delays: Vec<Duration>, shared: Shared) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, shared) = (listener.local_addr()?, Arc::new(shared));
        let accepting = spawn({
            let shared = shared.clone();
            move || {
                for (number, near) in listener.incoming().enumerate() {
                    let Ok(near) = near else { break };
                    if shared.ended.load(Ordering::SeqCst) {
                        break;
                    }
                    let late = number.checked_sub(1).map(|nth| delays.get(nth).or(delays.last()));
                    let delay = late.flatten().copied().unwrap_or_default();
                    let thread = spawn({
                        let shared = shared.clone();
                        move || shared.carry(number, near, target, delay)
                    });
                    shared.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
                }
            }
        });
        Ok(Self { address, shared, accepting: Some(accepting) })
    }

    /// Where sources connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether the connection that breaks has broken.
    pub fn has_broken(&self) -> bool {
        self.shared.has_broken.load(Ordering::SeqCst)
    }
}

impl Shared {
    /// One connection, until both ends have closed.
    fn carry(&self, number: usize, near: TcpStream, target: SocketAddr, delay: Duration) {
        sleep(delay);
        let Ok(far) = TcpStream::connect(target) else { return };
        let ends = (near.try_clone(), far.try_clone(), near.try_clone(), far.try_clone());
        let (Ok(near_too), Ok(far_too), Ok(a), Ok(b)) = ends else { return };
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).extend([a, b]);
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        let back = spawn(move || copy(&far_too, &near_too));
        let most = self.breaks.filter(|breaks| breaks.number == number).map(|breaks| breaks.after);
        if let Some(most) = most {
            let passed = io::copy(&mut (&near).take(most), &mut &far);
            if passed.is_ok_and(|passed| passed == most) {
                self.has_broken.store(true, Ordering::SeqCst);
                // What was received and not read makes the close a reset.
                let _ = near.shutdown(Shutdown::Both);
            }
            let _ = far.shutdown(Shutdown::Both);
        } else {
            copy(&near, &far);
        }
        let _ = back.join();
    }
}

/// Copies until one end closes, and closes the other's half.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the wait for a connection.
        let _ = TcpStream::connect(self.address);
        self.accepting.take().map(JoinHandle::join);
        for socket in self.shared.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let threads =
            std::mem::take(&mut *self.shared.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
    }
}
