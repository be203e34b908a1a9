//! Lends pages to a socket instead of copying them, through a pipe that takes references to them.
//!
//! This was tried for the engine and was slower, so it lives here: see `docs/develop/performance.md`.
//!
//! UNSAFETY: the system is given the address of guest memory. It takes references to the pages, so they outlive the
//! call even if the mapping is removed; nothing writes to this memory in the meantime.
#![expect(unsafe_code, reason = "the safe crates need slices, which guest memory must not be")]

use std::{
    io::{self, PipeReader, PipeWriter, Write},
    net::TcpStream,
    os::fd::{AsRawFd, RawFd},
};

use multifd::ram::GuestSlice;

/// A socket with its pipe.
pub(super) struct Lender {
    socket: TcpStream,
    ends: (PipeReader, PipeWriter),
}

impl Lender {
    pub(super) fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let ends = io::pipe()?;
        // The system refuses it beyond a user's total limit; then more calls are needed.
        let _ = rustix::pipe::fcntl_setpipe_size(&ends.1, ROOM);
        Ok(Self { socket, ends })
    }

    pub(super) fn send(&mut self, head: &[u8], pages: GuestSlice<'_>) -> io::Result<()> {
        self.socket.write_all(head)?;
        let mut sent = 0;
        while sent < pages.len() {
            let lent = lend(self.ends.1.as_raw_fd(), pages, sent)?;
            let mut left = lent;
            while left > 0 {
                let flags = rustix::pipe::SpliceFlags::empty();
                left -= rustix::pipe::splice(&self.ends.0, None, &self.socket, None, left, flags)?;
            }
            sent += lent;
        }
        Ok(())
    }

    pub(super) fn socket(&mut self) -> &mut TcpStream {
        &mut self.socket
    }
}

/// Puts the pages from byte `from` on into a pipe. Returns how many bytes it accepted.
fn lend(pipe: RawFd, pages: GuestSlice<'_>, from: usize) -> io::Result<usize> {
    let start = pages.as_ptr().wrapping_add(from).cast();
    let vector = libc::iovec { iov_base: start, iov_len: pages.len() - from };
    // SAFETY: one vector, which lies inside the slice's mapping for as long as the call lasts.
    let taken = unsafe { libc::vmsplice(pipe, &raw const vector, 1, 0) };
    usize::try_from(taken).map_err(|_| io::Error::last_os_error())
}

/// Two packets of 4 KiB pages.
const ROOM: usize = 1 << 20;
