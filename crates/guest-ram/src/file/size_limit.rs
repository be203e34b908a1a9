//! Handles the limit of a file's size (`RLIMIT_FSIZE`) as an error of the write instead of the end of the process.
//!
//! The system sends `SIGXFSZ` to the thread that writes beyond the limit. The default action of the signal ends the
//! process. The action of a signal belongs to the whole process, and so to the embedder; the signal mask belongs to
//! each thread. So the signal is blocked while a thread of ours writes, and a signal that the write has caused is
//! consumed before the signal is unblocked. Threads that only write to files block it once.
//!
//! UNSAFETY: the mask of the calling thread is changed and restored, and a pending signal of the thread is consumed.
#![expect(unsafe_code, reason = "blocks a signal in the calling thread")]

use std::{cell::Cell, io, mem::MaybeUninit};

use rustix::{
    io::Errno,
    process::{Resource, getrlimit},
};

/// Runs `write` so that a write beyond the limit of a file's size (`RLIMIT_FSIZE`, `ulimit -f`) fails with `EFBIG` and
/// does not end the process, regardless of what the process does with `SIGXFSZ`. Use it for threads that write to files
/// beside the engine; the engine protects its own writes this way.
pub fn with_file_size_errors<T>(write: impl FnOnce() -> T) -> T {
    let _held = Held::begin();
    write()
}

/// The greatest size in bytes that this process may give a file; `None` if there is no limit.
pub fn file_size_limit() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// Like [`with_file_size_errors`] for one write. The error of the write shows whether there is a signal to consume.
pub(crate) fn held<T>(write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mut held = Held::begin();
    let written = write();
    let too_large = |error: &io::Error| Errno::from_io_error(error) == Some(Errno::FBIG);
    held.signalled = written.as_ref().is_err_and(too_large);
    written
}

/// Protects all writes of the calling thread this way until the thread ends. For threads of our own.
pub fn hold_in_this_thread() {
    block();
    HELD.set(true);
}

/// Blocks the signal until the drop.
struct Held {
    /// The previous mask; `None` if the signal was blocked already, so that nothing must be undone.
    before: Option<libc::sigset_t>,
    /// Whether a signal may be pending.
    signalled: bool,
}

impl Held {
    fn begin() -> Self {
        let before = if HELD.get() { None } else { block() };
        Self { before, signalled: true }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(before) = self.before else { return };
        if self.signalled {
            let (set, none) = (only(), libc::timespec { tv_sec: 0, tv_nsec: 0 });
            // SAFETY: set and time are initialised, and no information about the signal is requested.
            while unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const none) } > 0 {}
        }
        // SAFETY: the set was written by the call that blocked the signal; the old mask is not requested.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    }
}

/// Blocks the signal in this thread. Returns the previous mask, or `None` if the signal was blocked already.
fn block() -> Option<libc::sigset_t> {
    let (set, mut before) = (only(), MaybeUninit::<libc::sigset_t>::uninit());
    // SAFETY: the set is initialised, and the old mask is written to memory that has room for it.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, before.as_mut_ptr()) };
    if blocked != 0 {
        // The call fails only for an invalid way of changing the mask.
        return None;
    }
    // SAFETY: the call has succeeded, so it has written the mask.
    let before = unsafe { before.assume_init() };
    // SAFETY: the mask is initialised, and the number is a signal's.
    let was_blocked = unsafe { libc::sigismember(&raw const before, libc::SIGXFSZ) } == 1;
    (!was_blocked).then_some(before)
}

/// The set that contains only this signal.
fn only() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the call writes the whole set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the set is initialised by now, and the number is a signal's.
    unsafe { libc::sigaddset(set.as_mut_ptr(), libc::SIGXFSZ) };
    // SAFETY: as above.
    unsafe { set.assume_init() }
}

thread_local! {
    /// Whether this thread has the signal blocked permanently.
    static HELD: Cell<bool> = const { Cell::new(false) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked() -> bool {
        let mut now = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: nothing is changed, and the mask is written to memory that has room for it.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), now.as_mut_ptr()) };
        // SAFETY: the call has written the mask.
        let now = unsafe { now.assume_init() };
        // SAFETY: the mask is initialised, and the number is a signal's.
        unsafe { libc::sigismember(&raw const now, libc::SIGXFSZ) == 1 }
    }

    #[test]
    fn signal_is_blocked_while_a_thread_writes_and_as_it_was_afterwards() {
        assert!(!is_blocked());
        assert!(with_file_size_errors(|| with_file_size_errors(is_blocked) && is_blocked()));
        assert!(!is_blocked());
        assert!(held(|| Ok(is_blocked())).expect("nothing failed"));
        assert!(!is_blocked());
    }

    /// The signal is sent to this thread only, and its default action would end all tests.
    #[test]
    fn signal_that_a_write_has_caused_is_taken_back() {
        let cause = || {
            // SAFETY: the call takes no arguments.
            let own = unsafe { libc::pthread_self() };
            // SAFETY: the signal is sent to this thread, which blocks it.
            unsafe { libc::pthread_kill(own, libc::SIGXFSZ) };
        };
        with_file_size_errors(cause);
        let failed = held(|| -> io::Result<()> {
            cause();
            Err(Errno::FBIG.into())
        });
        assert!(failed.is_err() && !is_blocked());
    }

    #[test]
    fn thread_of_our_own_has_it_blocked_to_its_end() {
        std::thread::spawn(|| {
            hold_in_this_thread();
            assert!(with_file_size_errors(is_blocked) && is_blocked());
        })
        .join()
        .expect("no panic");
    }
}
