//! Where `receive` gets its connections: an address, or `-` for standard input.
//!
//! Standard input can be a pipe or a file, which are no sockets. So `-` is a command, `cat`, that is given a copy of standard
//! input as another descriptor, because its own standard input is the connection.

use std::{
    fmt,
    io::{self, IsTerminal},
    os::fd::{AsRawFd, OwnedFd},
};

use multifd::channel::Address;
use rustix::{
    fs::{FileType, fstat},
    io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd},
};

use crate::{
    args::listen_address,
    output::{
        outcome::{Failure, While},
        outlet::say,
    },
};

/// What the command line gives.
#[derive(Clone, Debug)]
pub(crate) enum ListenAddress {
    Address(Address),
    StandardInput,
}

/// The same, to be listened at.
pub(crate) struct Opened {
    pub(crate) address: Address,
    /// The copy of standard input, which the command inherits.
    _input: Option<OwnedFd>,
}

impl ListenAddress {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text == "-" { Ok(Self::StandardInput) } else { listen_address(text).map(Self::Address) }
    }

    /// Prepares standard input, if that is the source. Other descriptors must not be opened before.
    pub(crate) fn open(&self) -> Result<Opened, Failure> {
        let Self::Address(address) = self else {
            let input = standard_input().map_err(|error| While::new("cannot read standard input", error));
            let input = input.map_err(|error| Failure::Usage(error.into()))?;
            let address = Address::Exec(format!("exec cat <&{}", input.as_raw_fd()));
            return Ok(Opened { address, _input: Some(input) });
        };
        Ok(Opened { address: address.clone(), _input: None })
    }

    /// Reports that the pipe on standard input is not read, where a user may expect it.
    pub(crate) fn note_unread_pipe(&self) {
        let is_pipe = fstat(io::stdin()).is_ok_and(|found| FileType::from_raw_mode(found.st_mode).is_fifo());
        if let (Self::Address(Address::Exec(_)), true) = (self, is_pipe) {
            say(
                "note: the command cannot read the pipe on standard input; to receive from it, use - as the address",
            );
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::StandardInput => f.write_str("standard input"),
        }
    }
}

/// A copy of standard input for a command.
fn standard_input() -> io::Result<OwnedFd> {
    let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    let input = io::stdin();
    if input.is_terminal() {
        return refused(
            "it is a terminal: pipe the stream of a migration into this command, or give an address",
        );
    }
    if FileType::from_raw_mode(fstat(&input)?.st_mode).is_dir() {
        return refused("it is a folder, expected a pipe, a socket or a file");
    }
    let copy = fcntl_dupfd_cloexec(&input, 3)?;
    if copy.as_raw_fd() > SHELL_MOST {
        return refused("too many descriptors were inherited: close some of 3 to 9 before");
    }
    fcntl_setfd(&copy, FdFlags::empty())?;
    Ok(copy)
}

/// A shell takes one digit as the number of a descriptor.
const SHELL_MOST: i32 = 9;
