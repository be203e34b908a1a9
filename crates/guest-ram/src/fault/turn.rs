//! When a thread runs that serves faults, or that copies in the background.
//!
//! A guest's thread waits for those that serve faults, and threads that copy often have all processors. Linux lets a thread finish its
//! slice, which is some milliseconds, before another one runs that wakes, also if that one is less nice. So these threads ask
//! for the shortest slice (Linux 6.12), which leaves their share of the processors as it is.
//!
//! Threads that copy are only nicer: one that ran on idle processors alone could keep a lock that a thread for faults needs for as long
//! as the host is busy.

#![expect(unsafe_code, reason = "system calls without a wrapper")]

use std::io;

use rustix::process::{getpriority_process, setpriority_process};

/// For a thread that serves faults: it runs soon after it was woken.
pub(super) fn serve_soon() {
    note("its slice", set_slice());
}

/// For a thread that works in the background: others run first. It always has a small share of the processors.
pub(super) fn lower(niceness: i32) {
    // Of this thread only.
    let lowered =
        getpriority_process(None).and_then(|now| setpriority_process(None, (now + niceness).min(19)));
    note("its priority", lowered.map_err(io::Error::from));
    serve_soon();
}

/// A thread that cannot be changed works as well, only later.
fn note(what: &str, changed: io::Result<()>) {
    if let Err(error) = changed {
        tracing::debug!(%error, what, "a thread keeps the scheduling that it has");
    }
}

/// Sets the slice of this thread, if it has the usual policy: with others, the field means something else.
fn set_slice() -> io::Result<()> {
    #[expect(clippy::cast_possible_truncation, reason = "48 bytes")]
    let size = size_of::<libc::sched_attr>() as u32;
    let mut attributes = libc::sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: The kernel writes at most `size` bytes, and the structure has them.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    if attributes.sched_policy != USUAL {
        return Ok(());
    }
    attributes.sched_runtime = SLICE_NANOS;
    // SAFETY: The kernel reads as many bytes as the first field says, and the structure has them.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `SCHED_OTHER`.
const USUAL: u32 = 0;
/// The shortest that Linux knows.
const SLICE_NANOS: u64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_changed_alone() {
        let nice = || getpriority_process(None).expect("a priority");
        let (before, lowered) = (nice(), std::thread::spawn(move || (lower(3), nice()).1));
        assert_eq!(lowered.join().expect("a thread"), (before + 3).min(19));
        assert_eq!(nice(), before);
        set_slice().expect("the kernel ignores a slice that it does not know");
    }
}
