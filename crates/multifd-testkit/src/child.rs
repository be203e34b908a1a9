//! Starts processes that do not outlive the test run that started them.
//!
//! The owner of a process kills it when dropped, but a test run that is killed drops nothing. The system can send a
//! process a signal when its parent dies. For this purpose, the parent is the *thread* that started the process, and a
//! test's thread ends before the run does. So a single thread starts all processes. It exists as long as this process,
//! so it ends with the run.
//!
//! The signal is not sent to processes that a child starts, nor to a child that gets other rights from its file
//! (set-user-ID).
//!
//! UNSAFETY: a function runs between fork and exec; it makes two system calls and nothing else.
#![expect(unsafe_code, reason = "a hook between fork and exec")]

use std::{
    io, mem,
    os::unix::process::CommandExt,
    process::{Child, Command},
    sync::{
        OnceLock,
        mpsc::{Sender, SyncSender, channel, sync_channel},
    },
    thread::Builder,
};

use rustix::{
    io::Errno,
    process::{Signal, getpid, getppid, set_parent_process_death_signal},
};

/// Starts `command`, which is killed when this process ends in any way. The builder's contents are moved out.
///
/// A thread of the kit starts it, so it has the namespaces of this process, not those that the caller's thread may have
/// entered.
///
/// # Errors
/// If the system refuses.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut command = mem::replace(command, Command::new("true"));
    let parent = getpid();
    let tie = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the parent died before this call, no signal is sent.
        if getppid() == Some(parent) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: `tie` makes two system calls; it allocates nothing, takes no lock and uses no memory but its own.
    unsafe { command.pre_exec(tie) };
    let (answer, answered) = sync_channel(1);
    let lost = || io::Error::other("the thread that starts processes has ended");
    starter()?.send((command, answer)).map_err(|_| lost())?;
    answered.recv().map_err(|_| lost())?
}

/// The command to start, and the channel for the result.
type Request = (Command, SyncSender<io::Result<Child>>);

/// The channel to the one thread.
fn starter() -> io::Result<&'static Sender<Request>> {
    static STARTER: OnceLock<Sender<Request>> = OnceLock::new();
    if let Some(starter) = STARTER.get() {
        return Ok(starter);
    }
    let (requests, requested) = channel::<Request>();
    // If two callers arrive at once, one of the threads gets no work and ends before it has started anything.
    Builder::new().name("children".into()).spawn(move || {
        for (mut command, answer) in requested {
            // The caller waits for this.
            let _ = answer.send(command.spawn());
        }
    })?;
    Ok(STARTER.get_or_init(|| requests))
}
