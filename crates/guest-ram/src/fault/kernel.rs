//! The system calls of `userfaultfd`, one function each.
//!
//! UNSAFETY: ioctls are given pointers to structures that outlive the call. The addresses they act on are not accessed by this
//! process: the kernel places pages only in memory that was registered, and only where there is no page. Memory that is
//! registered is guest memory, to which no Rust reference exists.
#![expect(unsafe_code, reason = "ioctls that no crate wraps")]

use std::{
    ops::Range,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};

use linux_raw_sys::general as sys;
use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode},
    mm::{Advice, UserfaultfdFlags, madvise, userfaultfd},
};

/// Opens a `userfaultfd` by the system call.
pub(super) fn by_call(user_only: bool) -> Result<OwnedFd, Errno> {
    let mode = if user_only { sys::UFFD_USER_MODE_ONLY } else { 0 };
    let flags =
        UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::from_bits_retain(mode);
    // SAFETY: nothing is registered yet; see above for what is registered later.
    unsafe { userfaultfd(flags) }
}

/// Opens a `userfaultfd` through the device.
pub(super) fn by_device() -> Result<OwnedFd, Errno> {
    let device = open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: the descriptor is the device, which has this call.
    unsafe { ioctl(&device, New) }
}

/// `USERFAULTFD_IOC_NEW`: the flags are the argument itself.
struct New;

// SAFETY: the call takes flags and returns a new descriptor.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(GROUP, 0)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        let flags = (UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK).bits();
        std::ptr::without_provenance_mut(usize::try_from(flags).unwrap_or(0))
    }

    unsafe fn output_from_ptr(new: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the call has returned a descriptor, which nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(new) })
    }
}

/// The first call. Returns the features that the kernel has.
pub(super) fn handshake(fd: BorrowedFd<'_>, features: u64) -> Result<u64, Errno> {
    let mut api = sys::uffdio_api { api: sys::UFFD_API.into(), features, ioctls: 0 };
    update::<API, _>(fd, &mut api)?;
    Ok(api.features)
}

/// Registers a range. Returns the calls that it allows, one bit each.
pub(super) fn register(fd: BorrowedFd<'_>, range: &Range<u64>, mode: u64) -> Result<u64, Errno> {
    let mut register = sys::uffdio_register { range: of(range), mode, ioctls: 0 };
    update::<REGISTER, _>(fd, &mut register)?;
    Ok(register.ioctls)
}

/// Ends the registration of a range. Wakes the threads that wait for missing pages, and no others.
pub(super) fn unregister(fd: BorrowedFd<'_>, range: &Range<u64>) -> Result<(), Errno> {
    // SAFETY: the structure belongs to this ioctl number.
    let request = unsafe { Setter::<UNREGISTER, _>::new(of(range)) };
    // SAFETY: see the head of this file.
    unsafe { ioctl(fd, request) }
}

/// Wakes the threads that wait for pages of a range.
pub(super) fn wake(fd: BorrowedFd<'_>, range: &Range<u64>) -> Result<(), Errno> {
    // SAFETY: the structure belongs to this ioctl number.
    let request = unsafe { Setter::<WAKE, _>::new(of(range)) };
    // SAFETY: see the head of this file.
    unsafe { ioctl(fd, request) }
}

/// How far a call came: the number of bytes, and the error that ended it. A call that did a part does not say why it
/// stopped; the next one, which begins there, does.
pub(super) type Done = (u64, Result<(), Errno>);

/// Places pages with these bytes.
pub(super) fn copy(fd: BorrowedFd<'_>, to: u64, bytes: &[u8], protect: bool) -> Done {
    let mode = if protect { sys::UFFDIO_COPY_MODE_WP.into() } else { 0 };
    let src = bytes.as_ptr().expose_provenance() as u64;
    let mut copy = sys::uffdio_copy { dst: to, src, len: bytes.len() as u64, mode, copy: 0 };
    let result = update::<COPY, _>(fd, &mut copy);
    done(copy.copy, bytes.len() as u64, result)
}

/// Places these pages themselves, which are then missing where they were.
pub(super) fn take(fd: BorrowedFd<'_>, to: u64, from: &mut [u8]) -> Done {
    let src = from.as_mut_ptr().expose_provenance() as u64;
    let mut taken = sys::uffdio_move { dst: to, src, len: from.len() as u64, mode: 0, move_: 0 };
    let result = update::<MOVE, _>(fd, &mut taken);
    done(taken.move_, from.len() as u64, result)
}

/// Places pages of zeros.
pub(super) fn zero(fd: BorrowedFd<'_>, range: &Range<u64>) -> Done {
    let mut zero = sys::uffdio_zeropage { range: of(range), mode: 0, zeropage: 0 };
    let result = update::<ZEROPAGE, _>(fd, &mut zero);
    done(zero.zeropage, range.end - range.start, result)
}

/// Maps pages that are in the file.
pub(super) fn resume(fd: BorrowedFd<'_>, range: &Range<u64>) -> Done {
    let mut resume = sys::uffdio_continue { range: of(range), mode: 0, mapped: 0 };
    let result = update::<CONTINUE, _>(fd, &mut resume);
    done(resume.mapped, range.end - range.start, result)
}

/// Makes pages inaccessible.
pub(super) fn poison(fd: BorrowedFd<'_>, range: &Range<u64>) -> Done {
    let mut poison = sys::uffdio_poison { range: of(range), mode: 0, updated: 0 };
    let result = update::<POISON, _>(fd, &mut poison);
    done(poison.updated, range.end - range.start, result)
}

/// Protects pages against writing, or ends that and wakes the writers.
pub(super) fn protect(fd: BorrowedFd<'_>, range: &Range<u64>, on: bool) -> Result<(), Errno> {
    let mut protect = sys::uffdio_writeprotect { range: of(range), mode: u64::from(on) };
    update::<WRITEPROTECT, _>(fd, &mut protect)
}

/// Drops pages, so that they are missing. In shared memory, they are dropped from the file.
pub(super) fn drop_pages(range: &Range<u64>, private: bool) -> Result<(), Errno> {
    let advice = if private { Advice::LinuxDontNeed } else { Advice::LinuxRemove };
    let start = std::ptr::with_exposed_provenance_mut(usize::try_from(range.start).unwrap_or(0));
    let len = usize::try_from(range.end - range.start).unwrap_or(0);
    // SAFETY: the range is guest memory, to which no reference exists; a page that is dropped reads as zero.
    unsafe { madvise(start, len, advice) }
}

/// Says whether huge pages may be made of this memory by themselves.
pub(super) fn advise_huge(range: &Range<u64>, wanted: bool) -> Result<(), Errno> {
    let advice = if wanted { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    let start = std::ptr::with_exposed_provenance_mut(usize::try_from(range.start).unwrap_or(0));
    let len = usize::try_from(range.end - range.start).unwrap_or(0);
    // SAFETY: the range is guest memory; the advice changes no contents.
    unsafe { madvise(start, len, advice) }
}

fn done(reported: i64, all: u64, result: Result<(), Errno>) -> Done {
    match (u64::try_from(reported), result) {
        (_, Ok(())) => (all, Ok(())),
        (Ok(bytes), Err(error)) => (bytes, Err(error)),
        // An error in place of a number.
        (Err(_), Err(error)) => (0, Err(error)),
    }
}

fn update<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, value: &mut T) -> Result<(), Errno> {
    // SAFETY: each caller passes the structure that belongs to its ioctl number.
    let request = unsafe { Updater::<OPCODE, _>::new(value) };
    // SAFETY: see the head of this file. A descriptor of another kind refuses the number.
    unsafe { ioctl(fd.as_fd(), request) }
}

fn of(range: &Range<u64>) -> sys::uffdio_range {
    sys::uffdio_range { start: range.start, len: range.end - range.start }
}

const DEVICE: &str = "/dev/userfaultfd";
const GROUP: u8 = 0xaa;
const API: Opcode = opcode::read_write::<sys::uffdio_api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<sys::uffdio_register>(GROUP, 0);
const UNREGISTER: Opcode = opcode::read::<sys::uffdio_range>(GROUP, 1);
const WAKE: Opcode = opcode::read::<sys::uffdio_range>(GROUP, 2);
const COPY: Opcode = opcode::read_write::<sys::uffdio_copy>(GROUP, 3);
const ZEROPAGE: Opcode = opcode::read_write::<sys::uffdio_zeropage>(GROUP, 4);
const MOVE: Opcode = opcode::read_write::<sys::uffdio_move>(GROUP, 5);
const WRITEPROTECT: Opcode = opcode::read_write::<sys::uffdio_writeprotect>(GROUP, 6);
const CONTINUE: Opcode = opcode::read_write::<sys::uffdio_continue>(GROUP, 7);
const POISON: Opcode = opcode::read_write::<sys::uffdio_poison>(GROUP, 8);
