//! Reads how a command has ended, through the descriptor of its process. Its number may belong to another process by
//! then.
//!
//! A process has one exit status. The system discards it if `SIGCHLD` is ignored. It gives the status to the first
//! waiter: a part of the program that waits for any child (`waitpid(-1)`) may take it from us. Linux 6.15 and later
//! still report it through the descriptor. On earlier versions it is lost, and that has an error of its own.
//!
//! UNSAFETY: one call of the system, which fills a structure of ours.
#![expect(unsafe_code, reason = "asks a process's descriptor for its exit status")]

use std::{
    error::Error,
    fmt, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
};

use rustix::{
    io::Errno,
    ioctl::{Opcode, Updater, ioctl, opcode},
    process::{WaitId, WaitIdOptions, WaitIdStatus, waitid},
};

/// Why it is unknown whether a command of an [`exec:`](super::Address::Exec) address has succeeded. It is inside the
/// [`io::Error`] of [`Link::finish`](super::Link::finish); [`io::Error::get_ref`] returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExitStatusUnknown;

impl fmt::Display for ExitStatusUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the command has ended, but its exit status is unknown: this process ignores SIGCHLD, or another part of it \
             reaps all children (waitpid with -1); set SIGCHLD to its default action, and let each part wait for its own \
             children only. The destination may have the guest: check it before the guest continues here",
        )
    }
}

impl Error for ExitStatusUnknown {}

/// Waits for the end of `process`, and takes its exit status.
///
/// # Errors
/// [`ExitStatusUnknown`], or the system's error.
pub(super) fn take(process: impl AsFd) -> io::Result<ExitStatus> {
    let process = process.as_fd();
    match wait(process, WaitIdOptions::EXITED) {
        Ok(Some(status)) => Ok(of(&status)),
        Ok(None) => Err(unknown()),
        Err(Errno::CHILD) => told_by_descriptor(process).ok_or_else(unknown),
        Err(error) => Err(error.into()),
    }
}

/// Checks that `process` is a child that has not been reaped.
///
/// # Errors
/// [`ExitStatusUnknown`] if it is not: its number may belong to another process.
pub(super) fn is_ours(process: impl AsFd) -> io::Result<()> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match wait(process.as_fd(), options) {
        Ok(_) => Ok(()),
        Err(Errno::CHILD) => Err(unknown()),
        Err(error) => Err(error.into()),
    }
}

fn wait(process: BorrowedFd<'_>, options: WaitIdOptions) -> Result<Option<WaitIdStatus>, Errno> {
    rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(process), options))
}

fn of(status: &WaitIdStatus) -> ExitStatus {
    let ended = status.exit_status().map(|code| (code & 0xff) << 8);
    ExitStatus::from_raw(ended.or(status.terminating_signal()).unwrap_or_default())
}

/// The status that the system keeps of a reaped process, for holders of its descriptor.
fn told_by_descriptor(process: BorrowedFd<'_>) -> Option<ExitStatus> {
    let mut info = PidfdInfo { mask: INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the number is that of a call that reads and writes this structure, whose length is a part of the number.
    let update = unsafe { Updater::<PIDFD_GET_INFO, PidfdInfo>::new(&mut info) };
    // SAFETY: as above; a system that does not know the call leaves the structure alone.
    unsafe { ioctl(process, update) }.ok()?;
    (info.mask & INFO_EXIT != 0).then(|| ExitStatus::from_raw(info.exit_code))
}

fn unknown() -> io::Error {
    io::Error::other(ExitStatusUnknown)
}

/// `struct pidfd_info` of Linux, in its first form.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64, "the structure of Linux 6.13");

const INFO_EXIT: u64 = 1 << 3;
const PIDFD_GET_INFO: Opcode = opcode::read_write::<PidfdInfo>(0xff, 11);

#[cfg(test)]
mod tests {
    use std::{
        os::fd::OwnedFd,
        process::{Child, Command},
    };

    use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};

    use super::*;

    fn started(script: &str) -> (Child, OwnedFd) {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn().expect("started");
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("its descriptor");
        (child, process)
    }

    #[test]
    fn status_and_signal_are_told_as_the_system_has_them() {
        let (_child, process) = started("exit 7");
        assert_eq!(take(&process).expect("known").code(), Some(7));
        let (_child, process) = started("kill -TERM $$");
        assert_eq!(take(&process).expect("known").signal(), Some(15));
    }

    /// Regression: when another part of the program had taken the status, a success was reported as a failure.
    #[test]
    fn child_that_somebody_else_has_reaped_is_told_by_its_descriptor_or_unknown() {
        let (child, process) = started("exit 9");
        assert!(is_ours(&process).is_ok());
        waitpid(Some(Pid::from_child(&child)), WaitOptions::empty()).expect("reaped");
        assert!(is_ours(&process).is_err());
        match take(&process) {
            Ok(status) => assert_eq!(status.code(), Some(9)),
            Err(error) => {
                let kind = error.get_ref().and_then(|inner| inner.downcast_ref());
                assert_eq!(kind, Some(&ExitStatusUnknown));
                assert!(error.to_string().contains("SIGCHLD"), "{error}");
            }
        }
    }
}
