//! Plays a script over real sockets.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use socket2::{Domain, SockRef, Socket, Type};

use super::{Act, On, Script, Step};

/// Where a destination listens.
#[derive(Clone, Debug)]
pub enum Target {
    /// At a TCP address.
    Tcp(SocketAddr),
    /// At a unix socket.
    Unix(PathBuf),
}

/// What the destination has sent. It keeps the connections open that no step has closed.
#[derive(Debug, Default)]
pub struct Heard {
    connections: HashMap<On, Connection>,
    /// Everything the destination has sent on main, as far as the script waited for it.
    pub said: Vec<u8>,
    /// The first action that failed, because the destination had closed the connection.
    pub refused: Option<(On, &'static str)>,
}

#[derive(Debug)]
enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Foreign connections come from a different host; on loopback this is a different address.
const STRANGER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), 0);
/// A destination that sends nothing for this time hangs.
const PATIENCE: Duration = Duration::from_secs(30);

impl Script {
    /// Plays the script, step by step. If the destination closes a connection, the remaining steps are tried.
    ///
    /// # Errors
    /// If the connection to the destination fails, or the destination hangs.
    pub fn play(&self, target: &Target) -> io::Result<Heard> {
        let mut heard = Heard::default();
        heard.play(&self.steps, target)?;
        Ok(heard)
    }
}

impl Heard {
    /// Plays more steps, on the connections that are open.
    ///
    /// # Errors
    /// As [`Script::play`].
    pub fn play(&mut self, steps: &[Step], target: &Target) -> io::Result<()> {
        for step in steps {
            let done = match (&step.act, self.connections.get_mut(&step.on)) {
                (Act::Connect, _) => Connection::open(target, step.on).map(|connection| {
                    self.connections.insert(step.on, connection);
                }),
                (_, None) => Err(io::ErrorKind::NotConnected.into()),
                (Act::Send(bytes), Some(connection)) => connection.stream().write_all(bytes),
                (Act::Dribble(bytes), Some(connection)) => {
                    bytes.iter().try_for_each(|byte| connection.stream().write_all(&[*byte]))
                }
                (Act::Close, Some(connection)) => connection.close(),
                (Act::Reset, Some(connection)) => {
                    connection.lingers_not()?;
                    self.connections.remove(&step.on);
                    Ok(())
                }
                (Act::Hear(word), Some(connection)) => connection.hear(word, &mut self.said),
            };
            match done {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
                Err(_) => self.refused = self.refused.or(Some((step.on, step.name))),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Waits until the destination has closed main, and returns everything it has sent there.
    ///
    /// # Errors
    /// If it sends and does nothing.
    pub fn rest(&mut self) -> io::Result<&[u8]> {
        if let Some(main) = self.connections.get_mut(&On::Main) {
            main.hear(&[], &mut self.said)?;
        }
        Ok(&self.said)
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Connection {
    fn open(target: &Target, on: On) -> io::Result<Self> {
        match target {
            Target::Tcp(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
                if let On::Stranger(_) = on {
                    socket.bind(&STRANGER.into())?;
                }
                socket.connect(&(*address).into())?;
                let stream = TcpStream::from(socket);
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(Self::Tcp(stream))
            }
            Target::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(Self::Unix(stream))
            }
        }
    }

    fn stream(&mut self) -> &mut dyn Stream {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    fn close(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    /// From now on, closing it causes a reset.
    fn lingers_not(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => SockRef::from(&*stream).set_linger(Some(Duration::ZERO)),
            Self::Unix(_) => Ok(()),
        }
    }

    /// Reads until `word` has arrived, or the destination has closed. If `word` is empty, it waits for the close.
    fn hear(&mut self, word: &[u8], said: &mut Vec<u8>) -> io::Result<()> {
        let mut bytes = [0; 512];
        loop {
            if !word.is_empty() && said.windows(word.len()).any(|window| window == word) {
                return Ok(());
            }
            match self.stream().read(&mut bytes) {
                Ok(0) => {
                    return if word.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
                }
                Ok(some) => said.extend(&bytes[..some]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the destination hangs"));
                }
                Err(error) if word.is_empty() && error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}
