//! Real QEMUs as peers.
//!
//! ```text
//! find      Qemu::v10_0()  which program; or, visibly, why a test is skipped
//! builder   qemu.vm()…     the command line
//! process   …start()       the process: serial lines, standard error, killed when dropped
//! qmp                      one command, one answer, every wait with a deadline
//! migrate                  the migration commands of a test, for either end
//! ```
//!
//! A test in ten lines:
//!
//! ```no_run
//! use multifd_testkit::{guest::Guest, qemu::{PATIENCE, Qemu}};
//! use serde_json::json;
//!
//! # fn main() -> Result<(), multifd_testkit::qemu::Error> {
//! let Some(qemu) = Qemu::v10_0() else { return Ok(()) };
//! let guest = Guest::new();
//! let mut source = qemu.vm().guest(&guest).start()?;
//! let mut destination = qemu.vm().guest(&guest).incoming().start()?;
//! for vm in [&mut source, &mut destination] {
//!     vm.set_capabilities(&[("multifd", true)])?;
//!     vm.set_parameters(json!({ "multifd-channels": 4 }))?;
//! }
//! let address = destination.migrate_incoming("tcp:127.0.0.1:0")?;
//! source.wait_round(3, PATIENCE)?;
//! source.migrate(&address)?;
//! source.wait_migration("completed", PATIENCE)?;
//! destination.wait_migration("completed", PATIENCE)?;
//! let at = source.round()?.unwrap_or(0);
//! destination.wait_round(at + 2, PATIENCE)?;
//! # Ok(())
//! # }
//! ```

mod builder;
mod find;
mod migrate;
mod process;
mod qmp;

use std::fmt;
use std::io;
use std::time::Duration;

pub use builder::VmBuilder;
pub use find::Qemu;
pub use process::Vm;

/// How long a test waits for something that takes a moment on an idle machine. It allows for a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Why a QEMU did not do what was requested.
pub enum Error {
    /// It refused a command; the class and text are QEMU's.
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, `GenericError` most often.
        class: String,
        /// QEMU's text.
        text: String,
    },
    /// It runs, but the expected result did not arrive in time, or a different one did.
    Unmet(String),
    /// Its process has ended, or closed its monitor.
    Gone(String),
    /// The system refused the communication.
    System(String, io::Error),
}

impl Error {
    /// QEMU's text, if it refused a command.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { text, .. } => Some(text),
            _ => None,
        }
    }

    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |cause| Self::System(what.into(), cause)
    }

    /// Adds information to the error, for the reader.
    fn with(self, more: &str) -> Self {
        match self {
            Self::Unmet(text) => Self::Unmet(text + more),
            Self::Gone(text) => Self::Gone(text + more),
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { command, class, text } => write!(f, "{command} refused: {class}: {text}"),
            Self::Unmet(text) | Self::Gone(text) => f.write_str(text),
            Self::System(what, cause) => write!(f, "{what}: {cause}"),
        }
    }
}

/// The readable text: this is what `unwrap` in a test shows.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

/// Checks `condition` until it yields something or `patience` has passed.
///
/// QEMU reports few of its changes, so this function polls; nothing else in the project does.
fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let start = std::time::Instant::now();
    loop {
        if let Some(found) = condition()? {
            return Ok(found);
        }
        if start.elapsed() >= patience {
            return Err(Error::Unmet(format!("waited {:.1} s in vain for {what}", patience.as_secs_f64())));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
