//! A shell command whose standard input and output are the one connection of a migration.
//!
//! ```text
//! ExecLink ── SocketLink ══ socket pair ══ stdin, stdout of /bin/sh -c COMMAND
//!     └────── Running: a descriptor of the process, which becomes readable when it ends
//! ```
//!
//! It uses a socket pair, not pipes: the socket calls work on it, and after the command has ended a write fails without
//! a signal. The command stays in this process's group, so that an `ssh` may ask for a password at the terminal.
//!
//! The owner of the link reaps the command, at the latest in the drop. It closes the connection, then sends SIGTERM,
//! then SIGKILL, each after a time limit. A migration that fails sends SIGTERM at once. Processes that the command has
//! started are not signalled; they find their input and output closed. The exit status decides whether the guest is at
//! the other end, so a command is not started if the status could not be known.

use std::{
    io,
    ops::Deref,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use socket2::{Domain, Socket, Type};

use super::{
    Context, ExitStatusUnknown, Host, Link, PeerSignal, Wake,
    check::{children_are_waited_for, refused},
    event_fd::EventFd,
    exit_status,
    socket::SocketLink,
};
use crate::{
    ram::{Part, PartMut},
    sync_types::Instant,
};

/// A connection to a command that was started for it.
pub(super) struct ExecLink {
    link: SocketLink,
    running: Ends,
}

/// A command that was started, and this side's end of its socket pair.
pub(super) struct Started {
    socket: Socket,
    running: Ends,
}

impl Started {
    pub(super) fn new(command: &str) -> io::Result<Self> {
        children_are_waited_for().map_err(refused)?;
        let (ours, theirs) = Socket::pair(Domain::UNIX, Type::STREAM, None)?;
        let (input, output) = (OwnedFd::from(theirs.try_clone()?), OwnedFd::from(theirs));
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).stdin(Stdio::from(input)).stdout(Stdio::from(output));
        let child = shell.spawn()?;
        // Only the command may have its ends, or it would never be seen to close them.
        drop(shell);
        let running = Ends(Arc::new(Running::new(child, format!("exec:{command}"))?));
        Ok(Self { socket: ours, running })
    }
}

impl ExecLink {
    /// Starts `command`.
    pub(super) fn start(command: &str, context: &Context) -> io::Result<Self> {
        Self::new(Started::new(command)?, context)
    }

    /// Creates a connection to a running command.
    pub(super) fn new(started: Started, context: &Context) -> io::Result<Self> {
        Ok(Self { link: SocketLink::new(started.socket, context)?, running: started.running })
    }

    /// Explains why a connection has broken or ended: the failure of a command is more precise than the system's error.
    fn explain(&self, or: io::Result<usize>) -> io::Result<usize> {
        match self.running.wait(EXIT_LAG) {
            Ok(Some(status)) if or.is_err() || !status.success() => Err(ended(status)),
            _ => or,
        }
    }
}

impl Link for ExecLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        match self.link.send(parts) {
            Err(error) if is_broken(&error) => self.explain(Err(error)),
            sent => sent,
        }
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        let room = parts.iter().any(|part| part.len() > 0);
        match self.link.recv(parts) {
            Ok(0) if room => self.explain(Ok(0)),
            Err(error) if is_broken(&error) => self.explain(Err(error)),
            received => received,
        }
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        self.link.is_readable()
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.link.set_recv_timeout(limit)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Terminate { link: self.link.waker(), running: self.running.0.clone() })
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.link.recv_waker()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.link.peer_signal()
    }

    fn peer(&self) -> String {
        self.running.name.clone()
    }

    fn host(&self) -> Option<Host> {
        None
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.link.close_send()
    }

    /// Waits until the command has ended. Its failure is an error.
    fn finish(&mut self) -> io::Result<()> {
        // If the command has ended, its side is closed already, which is fine.
        let _ = self.link.close_send();
        match self.running.wait(END_LIMIT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(ended(status)),
            None => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "the command did not end within {} s after the end of its input",
                    END_LIMIT.as_secs()
                ),
            )),
        }
    }
}

impl Drop for ExecLink {
    fn drop(&mut self) {
        self.link.waker().wake();
    }
}

/// Ends the command together with its connection, whose socket is closed first.
struct Ends(Arc<Running>);

impl Deref for Ends {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.0
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.reap();
    }
}

/// A started command, and the means to end it.
struct Running {
    name: String,
    /// A descriptor of the process, valid even if its number is reused; readable when the process has ended.
    process: OwnedFd,
    /// Readable when the command must end.
    woken: Arc<EventFd>,
    /// Relaxed: orders nothing. It only skips the wait for a normal end of a command that is being terminated.
    terminated: AtomicBool,
    /// The exit status, after a thread has waited for it.
    status: Mutex<Option<ExitStatus>>,
}

impl Running {
    fn new(mut child: Child, name: String) -> io::Result<Self> {
        let handles = || -> io::Result<_> {
            let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            exit_status::is_ours(&process)?;
            Ok((process, EventFd::new()?))
        };
        match handles() {
            Ok((process, woken)) => {
                let terminated = AtomicBool::new(false);
                Ok(Self { name, process, woken, terminated, status: Mutex::new(None) })
            }
            Err(error) => {
                // If another part of the program has reaped the process, its number may belong to another process.
                if !error.get_ref().is_some_and(|inner| inner.is::<ExitStatusUnknown>()) {
                    // It may have ended already, which is the goal.
                    let _ = child.kill();
                    let _ = child.wait();
                }
                Err(error)
            }
        }
    }

    /// Waits until the command has ended; `None` if `limit` passes first.
    ///
    /// # Errors
    /// [`io::ErrorKind::Interrupted`] as soon as it is to be terminated;
    /// [`ExitStatusUnknown`](super::ExitStatusUnknown) if it has ended and its status cannot be known.
    fn wait(&self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let mut fds =
            [PollFd::new(&self.process, PollFlags::IN), PollFd::new(self.woken.fd(), PollFlags::IN)];
        poll_until(&mut fds, limit)?;
        if !fds[0].revents().is_empty() {
            return self.status().map(Some);
        }
        if fds[1].revents().is_empty() { Ok(None) } else { Err(io::ErrorKind::Interrupted.into()) }
    }

    /// Waits for the end of the command and returns its exit status.
    fn status(&self) -> io::Result<ExitStatus> {
        let mut known = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(status) = *known {
            return Ok(status);
        }
        let status = exit_status::take(&self.process)?;
        *known = Some(status);
        Ok(status)
    }

    /// Ends the command, with as much force as needed.
    fn reap(&self) {
        if !self.terminated.load(Ordering::Relaxed) && self.has_ended(GRACE) {
            tracing::debug!(command = self.name, "ended");
        } else {
            self.signal(Signal::TERM);
            if !self.has_ended(GRACE) {
                tracing::warn!(command = self.name, "does not end: it is killed");
                self.signal(Signal::KILL);
            }
        }
        // It has ended, or it cannot be ended.
        let _ = self.status();
    }

    fn has_ended(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        poll_until(&mut fds, limit).is_ok() && !fds[0].revents().is_empty()
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.process, signal);
    }
}

struct Terminate {
    link: Arc<dyn Wake>,
    running: Arc<Running>,
}

impl Wake for Terminate {
    fn wake(&self) {
        self.running.terminated.store(true, Ordering::Relaxed);
        self.running.signal(Signal::TERM);
        self.running.woken.wake();
        self.link.wake();
    }
}

fn poll_until(fds: &mut [PollFd<'_>], limit: Duration) -> io::Result<()> {
    let end = super::deadline(limit);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match poll(fds, Some(&Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?)) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

fn is_broken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn ended(status: ExitStatus) -> io::Error {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("with exit status {code}"),
        (None, Some(signal)) => format!("by signal {signal}"),
        (None, None) => status.to_string(),
    };
    io::Error::new(io::ErrorKind::BrokenPipe, format!("the command ended {how}"))
}

/// The time between the end of a command's output and its own end.
const EXIT_LAG: Duration = Duration::from_secs(1);
/// The time limit for a command to write out the rest of its input.
const END_LIMIT: Duration = Duration::from_secs(60);
/// The time limit for a command to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);
