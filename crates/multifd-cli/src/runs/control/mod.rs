//! The socket of `--control`: another process asks for the numbers of a run, cancels it, or changes its limits.
//!
//! ```text
//! multifd ctl, or any client of QMP ─ commands ─▶ control (a thread) ─ session ─▶ Observed, Stop, Adjust
//! ```
//!
//! One client at a time, as at a QMP socket of QEMU. A client that says nothing is disconnected when another one waits, so
//! that a forgotten connection does not prevent a cancel. The socket belongs to this user alone (mode 0600); a stale one is
//! replaced, and it is removed at the end. The thread ends when its handle is dropped.

mod session;

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use multifd::{
    channel::{Address, Context, Link, Listen, Listener, Stop, Wake},
    ram::PartMut,
};

use self::session::{Session, Then};
use super::observed::Observed;
use crate::output::{
    outcome::While,
    outlet::{say, shown},
};

/// Serves clients until it is dropped.
pub(super) struct Control {
    ends: Arc<Ends>,
    listener: Arc<dyn Wake>,
    thread: Option<JoinHandle<()>>,
}

/// How the thread is woken at the end.
#[derive(Default)]
struct Ends {
    ended: AtomicBool,
    /// Ends the wait for the client's next command.
    client: Mutex<Option<Arc<dyn Wake>>>,
}

impl Control {
    /// Listens at `path` for commands to `run`, which ends with `stop`.
    ///
    /// # Errors
    /// If the socket cannot be made, or the system cannot start a thread.
    pub(super) fn start(path: &Path, run: &Arc<Observed>, stop: &Stop) -> Result<Self, While> {
        let failed = |error: io::Error| {
            While::new(format!("cannot listen at the control socket {}", shown(path)), error)
        };
        let listener = Listener::bind(&Address::Unix(path.to_owned())).map_err(failed)?;
        let (ends, waker) = (Arc::new(Ends::default()), listener.waker());
        let server = Server {
            listener,
            // The time for a client to accept a reply.
            context: Context::new(&Stop::new()).stall_timeout(Some(REPLY)),
            ends: ends.clone(),
            run: run.clone(),
            stop: stop.clone(),
        };
        let thread = Builder::new().name("control".into()).spawn(move || server.run()).map_err(failed)?;
        Ok(Self { ends, listener: waker, thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Sequentially consistent with the thread, which registers a client and then looks at it.
        self.ends.ended.store(true, Ordering::SeqCst);
        self.listener.wake();
        let client = self.ends.client().clone();
        client.inspect(|client| client.wake());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Ends {
    fn client(&self) -> std::sync::MutexGuard<'_, Option<Arc<dyn Wake>>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

/// What the thread owns.
struct Server {
    listener: Listener,
    context: Context,
    ends: Arc<Ends>,
    run: Arc<Observed>,
    stop: Stop,
}

impl Server {
    fn run(mut self) {
        let mut next = None;
        while !self.ends.has_ended() {
            let client = match next.take() {
                Some(client) => client,
                None => match self.listener.accept(&self.context) {
                    Ok(Some(client)) => client,
                    // Woken.
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(%error, "the control socket fails and is closed; the run continues");
                        return;
                    }
                },
            };
            *self.ends.client() = Some(client.recv_waker());
            if !self.ends.has_ended() {
                next = self.serve(client).unwrap_or_else(|error| {
                    tracing::debug!(%error, "the connection of a client of the control socket failed");
                    None
                });
            }
            *self.ends.client() = None;
        }
    }

    /// Serves a client until it disconnects. Returns the next one, if it has been waiting for this one.
    fn serve(&mut self, mut client: Box<dyn Link>) -> io::Result<Option<Box<dyn Link>>> {
        client.set_recv_timeout(Some(IDLE))?;
        let (run, stop) = (self.run.clone(), self.stop.clone());
        let mut session = Session::new(&run);
        send(&mut *client, &session.greeting())?;
        let mut bytes = [0; 4096];
        loop {
            match client.recv(&mut [PartMut::from(&mut bytes[..])]) {
                Ok(0) => return Ok(None),
                Ok(read) => session.receive(&bytes[..read]),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                        match self.listener.accept_waiting(&self.context)? {
                            Some(next) => return Ok(Some(next)),
                            None => continue,
                        }
                    }
                    _ => return Err(error),
                },
            }
            while let Some((reply, then)) = session.next_reply() {
                send(&mut *client, &reply)?;
                match then {
                    Then::Continue => {}
                    Then::Disconnect => return Ok(None),
                    // After the reply, because the run may end at once.
                    Then::Cancel => {
                        say("multifd: migrate_cancel at the control socket");
                        stop.cancel();
                    }
                }
            }
        }
    }
}

/// Sends a line.
fn send(client: &mut dyn Link, line: &str) -> io::Result<()> {
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        match client.send(&[rest.into()]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// After this time without a command, a client makes room for another one that waits.
const IDLE: Duration = Duration::from_secs(2);
const REPLY: Duration = Duration::from_secs(5);
