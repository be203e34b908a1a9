//! The file of a unix socket: taken only from a socket at which nobody listens, for its owner alone, and removed at the end.
//!
//! A path can be in use: a process listens there, and would wait without limit if its socket were removed. So the system is
//! asked first whether a process has the socket at the path. Two processes may find the same dead socket at once, and the slower one must not remove the
//! new socket of the faster one. So the check, the removal and the new socket are made while the folder is locked. The lock
//! is released by the system if the process ends. Other programs do not take it; for them the window is a few microseconds.

use std::{
    fs::{self, Permissions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, fchmod, flock, open},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket, Type};

use super::file_kind::kind_of;

/// Listens at `path`.
///
/// # Errors
/// [`AddrInUse`](io::ErrorKind::AddrInUse) if a process listens there, [`AlreadyExists`](io::ErrorKind::AlreadyExists) if the
/// path names anything but a socket; the system's error.
pub(super) fn listen(path: &Path, backlog: i32) -> io::Result<(Socket, SocketFile)> {
    let address = SockAddr::unix(path)?;
    let _locked = lock_folder(path);
    for _ in 0..ATTEMPTS {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // The file gets the mode of the socket, without the bits of the umask. So nobody else can connect at any time, and
        // the umask, which belongs to the whole process, stays as it is.
        fchmod(&socket, OWNER)?;
        match socket.bind(&address) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_dead(path)?;
                continue;
            }
            Err(error) => return Err(error),
        }
        let file = SocketFile::at(path)?;
        // Nobody can connect before it listens.
        file.for_its_owner()?;
        socket.listen(backlog)?;
        return Ok((socket, file));
    }
    Err(in_use("other processes listen there again and again"))
}

/// Removes a socket at which nobody listens.
fn remove_dead(path: &Path) -> io::Result<()> {
    let found = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        let why =
            format!("it exists and is {}, not a socket: remove it, or use another path", kind_of(&found));
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    }
    if !is_dead(path)? {
        return Err(in_use("another process listens at this socket: end it, or use another path"));
    }
    match path.symlink_metadata() {
        Ok(now) if identity(&now) == identity(&found) => fs::remove_file(path),
        // Another process has replaced it or removed it: the next attempt finds out.
        _ => Ok(()),
    }
}

/// Locks the folder of `path` against others that listen at a path in it. Without the lock after a second, or where a folder
/// cannot be locked: that is no reason not to listen.
fn lock_folder(path: &Path) -> Option<OwnedFd> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    for _ in 0..LOCK_ATTEMPTS {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => sleep(LOCK_PAUSE),
            locked => return locked.ok().map(|()| folder),
        }
    }
    tracing::debug!(folder = %path.display(), "another program has locked the folder of the socket");
    None
}

/// Whether no process has the socket. A stream socket that connects would be accepted, and a waiting QEMU would take it for
/// its source. A datagram socket is refused, with another error if a process has the socket, even if it does not listen yet.
fn is_dead(path: &Path) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(false),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::PROTOTYPE) => Ok(false),
            // Or it has gone: the path is free.
            Some(Errno::CONNREFUSED | Errno::NOENT) => Ok(true),
            Some(Errno::ACCESS | Errno::PERM) => Err(in_use(
                "a socket exists there that this user may not connect to, and a process may listen at it: remove it, or use \
                 another path",
            )),
            _ => Err(error),
        },
    }
}

fn in_use(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, format!("the address is in use: {why}"))
}

/// The file of a socket that was bound here.
pub(super) struct SocketFile {
    path: PathBuf,
    /// The socket keeps the inode in use, so no other file has its number while the socket is open.
    identity: (u64, u64),
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let identity = identity(&path.symlink_metadata()?);
        Ok(Self { path, identity })
    }

    /// Gives it mode 0600, which the umask may have reduced. The file is opened first and checked, because the path may
    /// name another one by now.
    fn for_its_owner(&self) -> io::Result<()> {
        let file = open(&self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let opened = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let found = fs::File::from(file);
        let metadata = found.metadata()?;
        if identity(&metadata) == self.identity && metadata.mode() & 0o7777 != OWNER.as_raw_mode() {
            fs::set_permissions(opened, Permissions::from_mode(OWNER.as_raw_mode()))?;
        }
        Ok(())
    }

    /// Removes the file, unless it is another file by now: a later listener has taken over the path.
    pub(super) fn remove(&self) {
        if self.path.symlink_metadata().is_ok_and(|found| identity(&found) == self.identity) {
            // If it is gone by now, the goal is reached.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn identity(found: &fs::Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// Read and write for the owner.
const OWNER: Mode = Mode::RUSR.union(Mode::WUSR);
/// How often another process may take the path in between.
const ATTEMPTS: u32 = 4;
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        (folder, path)
    }

    fn refused(path: &Path) -> io::Error {
        listen(path, 1).map(drop).expect_err("refused")
    }

    /// Regression: the socket was removed, and the process that listened there waited without limit.
    #[test]
    fn socket_at_which_somebody_listens_is_left_alone() {
        let (_folder, path) = folder();
        let other = UnixListener::bind(&path).expect("bound");
        let error = refused(&path);
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("another process listens"), "{error}");
        UnixStream::connect(&path).expect("the other one still listens");
        drop(other);
    }

    #[test]
    fn socket_whose_queue_is_full_is_in_use() {
        let (_folder, path) = folder();
        let other = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        other.bind(&SockAddr::unix(&path).expect("an address")).expect("bound");
        other.listen(0).expect("listening");
        let _waiting = UnixStream::connect(&path).expect("the only place");
        assert_eq!(refused(&path).kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists());
    }

    #[test]
    fn socket_of_another_type_is_in_use() {
        let (_folder, path) = folder();
        let _other = UnixDatagram::bind(&path).expect("bound");
        assert_eq!(refused(&path).kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists());
    }

    #[test]
    fn socket_at_which_nobody_listens_is_replaced() {
        let (folder, path) = folder();
        drop(UnixListener::bind(&path).expect("bound"));
        let (_socket, file) = listen(&path, 1).expect("replaced");
        UnixStream::connect(&path).expect("it listens");
        assert_eq!(fs::read_dir(folder.path()).expect("read").count(), 1, "nothing is left beside it");
        file.remove();
        assert!(!path.exists());
    }

    #[test]
    fn socket_at_which_somebody_is_about_to_listen_is_left_alone() {
        let (_folder, path) = folder();
        let other = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        other.bind(&SockAddr::unix(&path).expect("an address")).expect("bound");
        assert_eq!(refused(&path).kind(), io::ErrorKind::AddrInUse);
        other.listen(1).expect("listening");
        UnixStream::connect(&path).expect("it listens");
    }

    /// A QEMU that waits for its source takes the first connection for it.
    #[test]
    fn process_that_listens_gets_no_connection_from_the_check() {
        let (_folder, path) = folder();
        let other = UnixListener::bind(&path).expect("bound");
        assert_eq!(refused(&path).kind(), io::ErrorKind::AddrInUse);
        other.set_nonblocking(true).expect("set");
        assert_eq!(other.accept().expect_err("nobody").kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn of_many_that_replace_a_dead_socket_at_once_one_listens_and_the_others_are_refused() {
        let (folder, path) = folder();
        for _ in 0..8 {
            drop(UnixListener::bind(&path).expect("bound"));
            let bound: Vec<_> = std::thread::scope(|threads| {
                let all: Vec<_> = (0..4).map(|_| threads.spawn(|| listen(&path, 1))).collect();
                all.into_iter().map(|thread| thread.join().expect("no panic")).collect()
            });
            let (listening, refused): (Vec<_>, Vec<_>) = bound.into_iter().partition(Result::is_ok);
            assert_eq!(listening.len(), 1, "{} listen", listening.len());
            for error in refused.into_iter().filter_map(Result::err) {
                assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
            }
            UnixStream::connect(&path).expect("the one at the path listens");
            assert_eq!(fs::read_dir(folder.path()).expect("read").count(), 1);
            fs::remove_file(&path).expect("removed");
        }
    }

    #[test]
    fn path_of_something_else_is_refused_by_its_kind_and_left_alone() {
        let (folder, path) = folder();
        let other = |name: &str| folder.path().join(name);
        fs::write(other("file"), "x").expect("written");
        fs::create_dir(other("folder")).expect("made");
        rustix::fs::mknodat(rustix::fs::CWD, other("fifo"), rustix::fs::FileType::Fifo, OWNER, 0)
            .expect("made");
        std::os::unix::fs::symlink(&path, other("link")).expect("made");
        for (name, kind) in [
            ("file", "a regular file"),
            ("folder", "a folder"),
            ("fifo", "a FIFO"),
            ("link", "a symbolic link"),
        ] {
            let error = refused(&other(name));
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{error}");
            assert!(error.to_string().contains(&format!("it exists and is {kind}, not a socket")), "{error}");
            assert!(other(name).symlink_metadata().is_ok(), "{name}");
        }
    }
}
