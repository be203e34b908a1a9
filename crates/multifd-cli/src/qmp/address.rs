//! The address of a QMP socket, in the words of QEMU's `-qmp`.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use multifd::channel::Address;
use rustix::net::sockopt::socket_peercred;

use crate::output::outlet::shown;

/// `unix:PATH`, a path, or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum QmpAddress {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

impl QmpAddress {
    /// # Errors
    /// A text that says which part is invalid.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if !text.starts_with("tcp:") {
            let path = text.strip_prefix("unix:").unwrap_or(text);
            // QEMU's own form has options behind the path.
            let path = path.split_once(',').map_or(path, |(path, _)| path);
            return match path {
                "" => Err("expected unix:PATH, a path, or tcp:HOST:PORT".into()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        match text.parse::<Address>() {
            Ok(Address::Tcp { host, port: 0, .. }) => {
                Err(format!("the port of QMP at {host:?} is missing: expected tcp:HOST:PORT"))
            }
            Ok(Address::Tcp { host, port, .. }) => Ok(Self::Tcp { host, port }),
            Ok(_) => Err("expected unix:PATH, a path, or tcp:HOST:PORT".into()),
            Err(refused) => Err(refused.to_string()),
        }
    }

    /// Connects within `limit`.
    pub(super) fn connect(&self, limit: Duration) -> io::Result<Socket> {
        match self {
            Self::Unix(path) => UnixStream::connect(path).map(Socket::Unix),
            Self::Tcp { host, port } => {
                let mut last = None;
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, limit) {
                        Ok(stream) => return Ok(Socket::Tcp(stream)),
                        Err(error) => last = Some(error),
                    }
                }
                Err(last.unwrap_or_else(|| io::Error::other("the host has no address")))
            }
        }
    }
}

impl fmt::Display for QmpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", shown(path)),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// The connection to a QMP socket.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Where the process at the other end of a QMP socket runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// On this host, with this user; the folder is that of the QMP socket.
    This { user: u32, folder: PathBuf },
    /// At the other end of this connection.
    Other { here: SocketAddr, there: SocketAddr },
}

impl Socket {
    pub(super) fn host(&self, address: &QmpAddress) -> io::Result<Host> {
        match (self, address) {
            (Self::Tcp(stream), _) => {
                Ok(Host::Other { here: stream.local_addr()?, there: stream.peer_addr()? })
            }
            (Self::Unix(stream), QmpAddress::Unix(path)) => {
                // QEMU has another current folder. The parent of a bare name is empty until the path is absolute.
                let path = std::path::absolute(path)?;
                let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
                Ok(Host::This { user: socket_peercred(stream.as_fd())?.uid.as_raw(), folder })
            }
            (Self::Unix(_), QmpAddress::Tcp { .. }) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The command line of the process at the other end, if it runs on this host and may be looked at.
    pub(super) fn command_line(&self) -> Option<Vec<String>> {
        let Self::Unix(stream) = self else { return None };
        let process = socket_peercred(stream.as_fd()).ok()?.pid;
        let folder = Path::new("/proc").join(process.as_raw_pid().to_string());
        let line = std::fs::read(folder.join("cmdline")).ok()?;
        let words = line.strip_suffix(&[0])?.split(|byte| *byte == 0);
        let words: Vec<String> = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        // A socket that another program has made for QEMU has the identity of that program. QEMU may be started through a
        // loader, so its name need not be the first word.
        let is_qemu =
            |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("qemu-"));
        let program = std::fs::read_link(folder.join("exe")).ok()?;
        let named = is_qemu(&program) || words.iter().take(LOADER).any(|word| is_qemu(Path::new(word)));
        named.then_some(words)
    }

    /// Limits each call of `read`, and each of `write`.
    pub(super) fn limit(&self, read: Duration, write: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(read))?;
                stream.set_write_timeout(Some(write))
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(read))?;
                stream.set_write_timeout(Some(write))
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The number of words in which the name of the program is looked for.
const LOADER: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_a_path_or_a_host_with_a_port_and_else_refused() {
        let unix = |path: &str| Ok(QmpAddress::Unix(path.into()));
        assert_eq!(QmpAddress::parse("/run/vm/qmp"), unix("/run/vm/qmp"));
        assert_eq!(QmpAddress::parse("unix:/run/vm/qmp,server=on,wait=off"), unix("/run/vm/qmp"));
        let tcp = QmpAddress::parse("tcp:[::1]:4444").expect("an address");
        assert_eq!(tcp.to_string(), "tcp:[::1]:4444");
        for wrong in ["", "unix:", "tcp:", "tcp:host", "tcp:host:0", "tcp:host:99999"] {
            QmpAddress::parse(wrong).expect_err(wrong);
        }
    }
}
