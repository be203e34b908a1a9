//! Reads guest memory by a system call: what cannot be read is an error, and no signal.
//!
//! UNSAFETY: the system writes into a private buffer of the length that it is given. The other address is that of guest memory, which
//! the system checks, and to which no reference exists.
#![expect(unsafe_code, reason = "guest memory is handed to the system by its address")]

use std::io;

use crate::GuestSlice;

/// Fills `into` with the bytes of `memory`, which has the same length.
///
/// # Errors
/// If a part of it cannot be read.
pub(super) fn read(memory: &GuestSlice<'_>, into: &mut [u8]) -> io::Result<()> {
    assert_eq!(memory.len(), into.len(), "a buffer for all bytes");
    let this = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let from = memory.after(done);
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: from.as_ptr().cast(), iov_len: from.len() };
        // SAFETY: the local vector is a private buffer of that length.
        let read = unsafe { libc::process_vm_readv(this, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}
