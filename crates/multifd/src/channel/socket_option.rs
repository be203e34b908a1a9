//! Socket options that the safe crates do not support.
//!
//! UNSAFETY: `setsockopt` is given a pointer to a number that outlives the call, and the number's length.
#![expect(unsafe_code, reason = "setsockopt")]

use std::{io, os::fd::AsRawFd};

use socket2::Socket;

/// Sets an option whose value is a number and which the safe crates do not support.
///
/// # Errors
/// If the system refuses it.
pub(super) fn set_option(
    socket: &Socket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(0);
    // SAFETY: the option's value is a number of the length passed, and exists until the call has ended.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
