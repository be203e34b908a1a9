//! Checks an address before it is opened: a descriptor that cannot carry a migration, a command whose exit status this
//! process would not get.
//!
//! The caller checks before anything is done; the code that opens the address checks again.
//!
//! UNSAFETY: a number is borrowed as a descriptor to query what it is, and the disposition of a signal is read.
#![expect(unsafe_code, reason = "asks what a descriptor is, and what is done with a signal")]

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{BorrowedFd, RawFd},
};

use rustix::{
    fs::{FileType, OFlags, fcntl_getfl, fstat},
    net::{
        SocketType, getpeername,
        sockopt::{socket_acceptconn, socket_type},
    },
};

use super::Address;
use crate::error::{UntrustedText, Usage};

impl Address {
    /// Refuses an address to which no connection is possible, regardless of the other end. It does not change what the
    /// address names.
    ///
    /// # Errors
    /// [`Usage::Address`] if the value is one that the parser would refuse, [`Usage::Descriptor`] if an inherited descriptor
    /// is not a connected stream socket, [`Usage::ChildrenIgnored`] if the exit status of a command could not be known.
    pub fn check_connect(&self) -> Result<(), Usage> {
        self.check_value()?;
        match self {
            Self::Fd(fd) => match of_socket(*fd, CONNECTED)? {
                State::Connected => Ok(()),
                State::Listening => Err(unfit(*fd, "a listening socket", CONNECTED)),
                State::Neither => Err(unfit(*fd, "a stream socket that is not connected", CONNECTED)),
            },
            Self::Exec(_) => children_are_waited_for(),
            Self::Tcp { .. } | Self::Unix(_) | Self::Vsock { .. } => Ok(()),
        }
    }

    /// Refuses an address on which listening is impossible. It does not change what the address names.
    ///
    /// # Errors
    /// As [`check_connect`](Self::check_connect); a descriptor may also be a listening stream socket.
    pub fn check_listen(&self) -> Result<(), Usage> {
        self.check_value()?;
        match self {
            Self::Fd(fd) => match of_socket(*fd, EITHER)? {
                State::Connected | State::Listening => Ok(()),
                State::Neither => {
                    Err(unfit(*fd, "a stream socket that is neither listening nor connected", EITHER))
                }
            },
            Self::Exec(_) => children_are_waited_for(),
            Self::Tcp { .. } | Self::Unix(_) | Self::Vsock { .. } => Ok(()),
        }
    }
}

impl Address {
    fn check_value(&self) -> Result<(), Usage> {
        let refused = |why| Usage::Address { found: self.to_string(), why };
        self.why_impossible().map_or(Ok(()), |why| Err(refused(why)))
    }
}

/// Converts the refusal to the error of opening an address.
pub(super) fn refused(usage: Usage) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, usage)
}

/// The state of a stream socket.
enum State {
    Listening,
    Connected,
    Neither,
}

fn of_socket(fd: RawFd, expected: &'static str) -> Result<State, Usage> {
    // SAFETY: `check_value` has refused negative numbers. The number is borrowed to query what it is, and nothing is done
    // to it; if it is not open the calls fail.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) };
    let Ok(flags) = fcntl_getfl(socket) else { return Err(unfit(fd, "not open in this process", expected)) };
    let other = || unfit(fd, kind(fd, socket), expected);
    if flags.contains(OFlags::PATH) {
        return Err(unfit(fd, "opened only as a path (O_PATH)", expected));
    }
    match socket_type(socket).map_err(|_| other())? {
        SocketType::STREAM => {}
        SocketType::DGRAM => return Err(unfit(fd, "a datagram socket", expected)),
        SocketType::SEQPACKET => return Err(unfit(fd, "a socket of packets (SOCK_SEQPACKET)", expected)),
        _ => return Err(unfit(fd, "a socket without a stream", expected)),
    }
    if socket_acceptconn(socket).map_err(|_| other())? {
        return Ok(State::Listening);
    }
    Ok(if getpeername(socket).is_ok() { State::Connected } else { State::Neither })
}

/// The kind of a descriptor that is not a socket, with the system's name for it.
fn kind(fd: RawFd, of: BorrowedFd<'_>) -> String {
    let kind = match fstat(of).map(|found| FileType::from_raw_mode(found.st_mode)) {
        Ok(FileType::RegularFile) => "a regular file",
        Ok(FileType::Directory) => "a folder",
        Ok(FileType::Fifo) => "a pipe",
        Ok(FileType::CharacterDevice) => "a character device",
        Ok(FileType::BlockDevice) => "a block device",
        _ => "no socket",
    };
    match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(name) => format!("{kind} ({})", UntrustedText::from_bytes(name.as_os_str().as_encoded_bytes())),
        Err(_) => kind.to_owned(),
    }
}

fn unfit(fd: RawFd, found: impl Into<String>, expected: &'static str) -> Usage {
    Usage::Descriptor { fd, found: found.into(), expected }
}

/// Checks that a command's exit status is kept until it is read.
///
/// # Errors
/// [`Usage::ChildrenIgnored`] if it is not.
pub(super) fn children_are_waited_for() -> Result<(), Usage> {
    let mut set = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is given, and the present one is written to `set`, which has room for it.
    let asked = unsafe { libc::sigaction(libc::SIGCHLD, std::ptr::null(), set.as_mut_ptr()) };
    if asked != 0 {
        // This is checked again when the command has ended.
        tracing::debug!(error = %io::Error::last_os_error(), "the action of SIGCHLD cannot be read");
        return Ok(());
    }
    // SAFETY: the call has succeeded, so it has written all of it.
    let set = unsafe { set.assume_init() };
    let ignored = set.sa_sigaction == libc::SIG_IGN || set.sa_flags & libc::SA_NOCLDWAIT != 0;
    if ignored { Err(Usage::ChildrenIgnored) } else { Ok(()) }
}

const CONNECTED: &str = "a connected stream socket";
const EITHER: &str = "a stream socket that is listening or connected";

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        net::{TcpListener, TcpStream, UdpSocket},
        os::{
            fd::{AsRawFd, OwnedFd},
            unix::net::UnixStream,
        },
    };

    use super::*;

    fn told_of(checked: Result<(), Usage>) -> String {
        checked.expect_err("refused").to_string()
    }

    fn both(of: impl Into<OwnedFd>) -> [Result<(), Usage>; 2] {
        let fd = of.into();
        let address = Address::Fd(fd.as_raw_fd());
        [address.check_connect(), address.check_listen()]
    }

    #[test]
    fn sockets_that_carry_a_migration_are_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let connected = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        assert_eq!(both(connected), [Ok(()), Ok(())]);
        let (one, _other) = UnixStream::pair().expect("a pair");
        assert_eq!(both(one), [Ok(()), Ok(())]);
        let [connect, listen] = both(listener);
        assert_eq!(listen, Ok(()));
        assert!(told_of(connect).contains("is a listening socket, expected a connected stream socket"));
    }

    #[test]
    fn what_a_descriptor_is_that_carries_none_is_told() {
        let (pipe, _end) = io::pipe().expect("a pipe");
        let path = rustix::fs::open("/", OFlags::PATH, rustix::fs::Mode::empty()).expect("a path");
        let fresh =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        for (of, told) in [
            (File::open("/dev/null").expect("open").into(), "a character device (/dev/null)"),
            (File::open("/").expect("open").into(), "a folder (/)"),
            (tempfile::tempfile().expect("a file").into(), "a regular file ("),
            (pipe.into(), "a pipe (pipe:["),
            (path, "opened only as a path"),
            (UdpSocket::bind("127.0.0.1:0").expect("bound").into(), "a datagram socket"),
            (OwnedFd::from(fresh), "a stream socket that is n"),
        ] {
            let [connect, listen] = both(of);
            for text in [told_of(connect), told_of(listen)] {
                assert!(text.contains(told) && text.contains("expected a "), "{text}");
            }
        }
        let closed = Address::Fd(RawFd::MAX).check_listen();
        assert!(told_of(closed).contains("is not open in this process"));
    }
}
