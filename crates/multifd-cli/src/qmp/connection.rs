//! A client of QMP: one command at a time. QEMU serves one client after the other at a socket.

use std::{
    fmt,
    io::{self, Read, Write},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use multifd::{channel::Stop, error::UntrustedText};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::address::{Host, QmpAddress, Socket};
use crate::output::outcome::Failure;

/// A QEMU that executes commands.
#[derive(Debug)]
pub(crate) struct Qmp {
    socket: Socket,
    address: QmpAddress,
    version: Version,
    /// Bytes behind the last line.
    unread: Vec<u8>,
    /// When the guest was last stopped, and last resumed, by QEMU's clock.
    stopped: Option<Duration>,
    resumed: Option<Duration>,
}

/// QEMU's version, such as 10.0.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(crate) struct Version {
    major: u32,
    minor: u32,
    micro: u32,
}

impl Version {
    /// The first version whose multifd this program is compatible with.
    pub(crate) const FIRST: Self = Self { major: 5, minor: 0, micro: 0 };

    /// The first version that has channels together with post-copy.
    pub(crate) const MULTIFD_AND_POSTCOPY: Self = Self { major: 10, minor: 1, micro: 0 };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, micro } = self;
        write!(f, "{major}.{minor}.{micro}")
    }
}

/// Why a QEMU did not execute a command.
#[derive(Debug)]
pub(crate) enum QmpError {
    /// No connection.
    Connect(QmpAddress, io::Error),
    /// It accepted the connection and did not greet.
    Busy(QmpAddress),
    /// What it sent is not QMP.
    NotQmp(QmpAddress),
    /// The connection broke, or QEMU ended.
    Closed { command: String, error: Option<io::Error> },
    /// It did not reply in time.
    Silent { command: String, limit: Duration },
    /// It replied with an error.
    Refused { command: String, reason: UntrustedText },
    /// Its reply lacks something.
    Incomplete { command: &'static str, lacks: &'static str },
    /// The stop ended the wait.
    Stopped(multifd::Error),
    /// An earlier migration has ended, and QEMU still keeps its connections.
    NotCleanedUp,
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(address, _) => {
                write!(
                    f,
                    "cannot connect to QMP at {address}: check that a QEMU with -qmp {address},server=on,wait=off runs"
                )
            }
            Self::Busy(address) => write!(
                f,
                "QEMU does not answer at {address}: another program, such as libvirt, is probably connected there; QEMU \
                 serves one client at each QMP socket (-qmp can be given twice)"
            ),
            Self::NotQmp(address) => {
                write!(f, "what answers at {address} is not QMP: check that it is not the monitor (-monitor)")
            }
            Self::Closed { command, .. } => write!(
                f,
                "the QMP connection ended at the command {command}: QEMU has probably ended, its standard error has the reason"
            ),
            Self::Silent { command, limit } => {
                write!(f, "QEMU did not reply to the command {command} for {} s", limit.as_secs())
            }
            Self::Refused { command, reason } => write!(f, "QEMU refused the command {command}: {reason}"),
            Self::Incomplete { command, lacks } => {
                write!(f, "QEMU's reply to the command {command} has no {lacks}; this version may be too old")
            }
            Self::Stopped(error) => error.fmt(f),
            Self::NotCleanedUp => f.write_str(
                "QEMU keeps the connections of a migration that has ended (query-yank), so another one is impossible until QEMU \
                 is restarted; the guest runs on",
            ),
        }
    }
}

impl std::error::Error for QmpError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Connect(_, error) | Self::Closed { error: Some(error), .. } => Some(error),
            _ => None,
        }
    }
}

impl Qmp {
    /// Connects, and waits for the greeting until `stop`.
    ///
    /// # Errors
    /// That of the stop.
    pub(crate) fn connect(address: &QmpAddress, stop: &Stop) -> Result<Self, Failure> {
        Self::open(address, stop).map_err(|error| match error {
            QmpError::Stopped(error) => Failure::of(error),
            other => other.into(),
        })
    }

    /// The same, with the error of the client.
    ///
    /// # Errors
    /// [`QmpError::Stopped`] at the stop.
    pub(crate) fn open(address: &QmpAddress, stop: &Stop) -> Result<Self, QmpError> {
        let failed = |error| QmpError::Connect(address.clone(), error);
        let socket = address.connect(GREETING).map_err(failed)?;
        socket.limit(LOOK, REPLY).map_err(failed)?;
        let mut qmp = Self {
            socket,
            address: address.clone(),
            version: Version::default(),
            unread: Vec::new(),
            stopped: None,
            resumed: None,
        };
        let end = Instant::now() + GREETING;
        let greeting = loop {
            if let Some(error) = stop.error() {
                return Err(QmpError::Stopped(error));
            }
            match qmp.line().map_err(failed)? {
                Some(line) => break line,
                None if Instant::now() < end => {}
                None => return Err(QmpError::Busy(address.clone())),
            }
        };
        let greeting: Result<Greeting, _> = serde_json::from_slice(&greeting);
        qmp.version = greeting.map_err(|_| QmpError::NotQmp(address.clone()))?.qmp.version.qemu;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// QEMU's version.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// Where this QEMU runs.
    pub(super) fn host(&self) -> io::Result<Host> {
        self.socket.host(&self.address)
    }

    /// The command line of this QEMU, if it runs on this host and may be looked at.
    pub(crate) fn command_line(&self) -> Option<Vec<String>> {
        self.socket.command_line()
    }

    /// Executes a command and returns its result. It is not interrupted: the state of the guest must be known.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let closed = |error| QmpError::Closed { command: command.to_owned(), error };
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.socket.write_all(line.as_bytes()).map_err(|error| closed(Some(error)))?;
        let end = Instant::now() + REPLY;
        loop {
            let line = match self.line() {
                Ok(Some(line)) => line,
                Ok(None) if Instant::now() < end => continue,
                Ok(None) => return Err(QmpError::Silent { command: command.to_owned(), limit: REPLY }),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(closed(None)),
                Err(error) => return Err(closed(Some(error))),
            };
            let reply: Reply =
                serde_json::from_slice(&line).map_err(|_| QmpError::NotQmp(self.address.clone()))?;
            match reply {
                Reply { result: None, error: None, event, timestamp } => {
                    self.note(event.as_deref(), timestamp);
                }
                Reply { error: Some(error), .. } => {
                    let reason = UntrustedText::from(error.desc.as_str());
                    return Err(QmpError::Refused { command: command.to_owned(), reason });
                }
                Reply { result: Some(result), .. } => return Ok(result),
            }
        }
    }

    /// How long the guest was stopped when it was last resumed.
    pub(crate) fn pause(&self) -> Option<Duration> {
        self.resumed?.checked_sub(self.stopped?)
    }

    /// How long the guest has been stopped, if it is stopped as far as is known, and runs on this host.
    pub(crate) fn stopped_for(&self) -> Option<Duration> {
        // Another host may have another time.
        matches!(self.host().ok()?, Host::This { .. }).then_some(())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let stopped = self.stopped.filter(|stopped| self.resumed.is_none_or(|resumed| resumed < *stopped))?;
        now.checked_sub(stopped)
    }

    fn note(&mut self, event: Option<&str>, timestamp: Option<Timestamp>) {
        let time =
            timestamp.map(|at| Duration::from_secs(at.seconds) + Duration::from_micros(at.microseconds));
        match event {
            Some("STOP") => self.stopped = time,
            Some("RESUME") => self.resumed = time,
            _ => {}
        }
    }

    /// A field of the result of a command without arguments.
    pub(super) fn query(&mut self, command: &'static str, field: &'static str) -> Result<Value, QmpError> {
        let mut result = self.execute(command, json!({}))?;
        match result.get_mut(field) {
            Some(value) => Ok(value.take()),
            None => Err(QmpError::Incomplete { command, lacks: field }),
        }
    }

    /// The result of a command without arguments, which is an object.
    pub(super) fn query_all(&mut self, command: &'static str) -> Result<Map<String, Value>, QmpError> {
        match self.execute(command, json!({}))? {
            Value::Object(fields) => Ok(fields),
            _ => Err(QmpError::Incomplete { command, lacks: "fields" }),
        }
    }

    /// The next line; `None` if nothing came for a while.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let rest = self.unread.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.unread, rest)));
            }
            if self.unread.len() > LONGEST_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a reply is too long"));
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.unread.extend_from_slice(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Hello,
}

#[derive(Deserialize)]
struct Hello {
    version: Versions,
}

#[derive(Deserialize)]
struct Versions {
    qemu: Version,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    timestamp: Option<Timestamp>,
}

#[derive(Deserialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u64,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// The time limit for a connection, and for the greeting.
const GREETING: Duration = Duration::from_secs(10);
/// The time limit for a reply. QEMU's main thread also does other work, such as the end of a migration.
const REPLY: Duration = Duration::from_secs(120);
/// How often an interrupt is looked for.
const LOOK: Duration = Duration::from_millis(200);
/// Replies here have a few kilobytes.
const LONGEST_LINE: usize = 16 << 20;
