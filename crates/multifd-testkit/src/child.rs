//! Processes that do not outlive the run that started them.
//!
//! Whoever owns a process kills it when dropped, but a run that is killed drops nothing. The system can send a process a
//! signal when its parent dies; what it means by that is the *thread* that started it, and a test's thread ends before the
//! run does. So all of them are started by one thread, which lasts as long as this process: its end is the run's end.
//!
//! What a child starts itself is not told. A child that is given other rights by its file (set-user-ID) is not told either.
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

/// Starts `command`, of which nothing is left here, to be killed when this process ends, however it ends.
///
/// It is started from a thread of the kit, so it has this process's namespaces and not those that the caller's thread may
/// have moved into.
///
/// # Errors
/// If the system refuses.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut command = mem::replace(command, Command::new("true"));
    let parent = getpid();
    let tie = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // A parent that died before this call is not told of.
        if getppid() == Some(parent) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: `tie` makes two system calls; it allocates nothing, takes no lock and uses no memory but its own.
    unsafe { command.pre_exec(tie) };
    let (answer, answered) = sync_channel(1);
    let lost = || io::Error::other("the thread that starts processes has ended");
    starter()?.send((command, answer)).map_err(|_| lost())?;
    answered.recv().map_err(|_| lost())?
}

/// What is to be started, and where to say how that went.
type Request = (Command, SyncSender<io::Result<Child>>);

/// The way to the one thread.
fn starter() -> io::Result<&'static Sender<Request>> {
    static STARTER: OnceLock<Sender<Request>> = OnceLock::new();
    if let Some(starter) = STARTER.get() {
        return Ok(starter);
    }
    let (requests, requested) = channel::<Request>();
    // Should two come at once, one of the threads finds itself without work and ends before it has started anything.
    Builder::new().name("children".into()).spawn(move || {
        for (mut command, answer) in requested {
            // Whoever asked waits for this.
            let _ = answer.send(command.spawn());
        }
    })?;
    Ok(STARTER.get_or_init(|| requests))
}
