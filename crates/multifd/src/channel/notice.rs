//! Reads the notices of zero-copy sends from a socket's error queue.
//!
//! UNSAFETY: the system fills a buffer of control data, which is walked with the macros of the C library; what they
//! point to lies in the buffer and is copied out.
#![expect(unsafe_code, reason = "the safe crates do not know these control messages")]

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

/// The system has completed these sends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notice {
    pub(super) first: u32,
    pub(super) last: u32,
    /// The bytes were copied first.
    pub(super) copied: bool,
}

impl Notice {
    /// The next notice, if there is one.
    pub(super) fn next(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        // An array of words, so that the messages in it are aligned.
        let mut control = [0_u64; 32];
        // SAFETY: all zero is a message without address, vectors and control data.
        let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        message.msg_control = control.as_mut_ptr().cast();
        #[allow(clippy::useless_conversion, reason = "the field's type differs between C libraries")]
        {
            message.msg_controllen = size_of_val(&control).try_into().unwrap_or(0);
        }
        // SAFETY: `message` gives the system the length of `control`, which has that room and outlives the call.
        let read = unsafe {
            libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
        };
        if read < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        // SAFETY: the system has filled `message`, and `control` still exists.
        let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        while !header.is_null() {
            // SAFETY: the macros return headers that lie completely in `control`.
            let found = unsafe { header.read() };
            let tells = matches!(
                (found.cmsg_level, found.cmsg_type),
                (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
            );
            // SAFETY: the macro only calculates.
            let least = unsafe { libc::CMSG_LEN(ERROR_LEN) };
            #[allow(clippy::useless_conversion, reason = "the field's type differs between C libraries")]
            if tells && usize::try_from(found.cmsg_len).is_ok_and(|len| len >= least as usize) {
                // SAFETY: the message's data lie after its header.
                let data = unsafe { libc::CMSG_DATA(header) };
                // SAFETY: the data are long enough, as checked above, and any bytes are numbers.
                let notice = unsafe { data.cast::<libc::sock_extended_err>().read_unaligned() };
                if notice.ee_errno == 0 && notice.ee_origin == ZEROCOPY {
                    let copied = notice.ee_code == COPIED;
                    return Ok(Some(Self { first: notice.ee_info, last: notice.ee_data, copied }));
                }
            }
            // SAFETY: as for the first header.
            header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the socket's error queue contains an unknown message",
        ))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
const ERROR_LEN: libc::c_uint = size_of::<libc::sock_extended_err>() as libc::c_uint;
/// `SO_EE_ORIGIN_ZEROCOPY`.
const ZEROCOPY: u8 = 5;
/// `SO_EE_CODE_ZEROCOPY_COPIED`.
const COPIED: u8 = 1;
