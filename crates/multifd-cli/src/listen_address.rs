//! Where `receive` gets its connections: an address, `-` for standard input, or `systemd` for sockets that a service manager
//! has opened.
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
    service,
};

/// What the command line gives.
#[derive(Clone, Debug)]
pub(crate) enum ListenAddress {
    Address(Address),
    StandardInput,
    /// The sockets that a service manager passes.
    Systemd,
}

/// The same, to be listened at.
pub(crate) struct Opened {
    pub(crate) address: Address,
    /// The copy of standard input, which the command inherits.
    _input: Option<OwnedFd>,
}

impl ListenAddress {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "-" => Ok(Self::StandardInput),
            "systemd" => Ok(Self::Systemd),
            _ => listen_address(text).map(Self::Address),
        }
    }

    /// The addresses of this many jobs; by default one, or one for each socket that was passed.
    ///
    /// # Errors
    /// [`Failure::Usage`] if there are not as many.
    pub(crate) fn of_jobs(&self, jobs: Option<u16>) -> Result<Vec<Address>, Failure> {
        let refused =
            |why: String| Failure::Usage(While::new(format!("cannot listen at {self}"), why).into());
        let address = match self {
            Self::Systemd => {
                let sockets = service::sockets()
                    .map_err(|error| While::new(format!("cannot listen at {self}"), error))?;
                if jobs.is_some_and(|jobs| usize::from(jobs) != sockets.len()) {
                    let why = format!("{} sockets were passed; leave --jobs out", sockets.len());
                    return Err(refused(why));
                }
                return Ok(sockets.into_iter().map(Address::Fd).collect());
            }
            Self::StandardInput => return Err(refused(SINGLE.into())),
            Self::Address(address) => address,
        };
        let jobs = jobs.unwrap_or(1);
        (0..jobs).map(|job| of_job(address, job, jobs).map_err(refused)).collect()
    }

    /// Prepares standard input, if that is the source. Other descriptors must not be opened before.
    pub(crate) fn open(&self) -> Result<Opened, Failure> {
        if let Self::Systemd = self {
            return match self.of_jobs(None)?.as_slice() {
                [address] => Ok(Opened { address: address.clone(), _input: None }),
                more => {
                    let why = format!("{} sockets were passed, expected one; more need --dir", more.len());
                    Err(Failure::Usage(While::new("cannot listen at systemd", why).into()))
                }
            };
        }
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
            Self::Systemd => f.write_str("systemd"),
        }
    }
}

/// The address of job `job`, counted from 0, of `jobs`; or why there is none.
fn of_job(address: &Address, job: u16, jobs: u16) -> Result<Address, String> {
    let none_left = |what: &str| {
        format!("there are no {jobs} {what} from the given one on; use a smaller one, or fewer --jobs")
    };
    Ok(match address {
        Address::Tcp { host, port, options } => {
            let (host, options) = (host.clone(), options.clone());
            // Port 0 is a free port, of which there is one for each.
            let next = if *port == 0 { Some(0) } else { port.checked_add(job) };
            Address::Tcp { host, port: next.ok_or_else(|| none_left("ports"))?, options }
        }
        Address::Vsock { cid, port } => {
            let next = if *port == u32::MAX { Some(*port) } else { port.checked_add(job.into()) };
            Address::Vsock { cid: *cid, port: next.ok_or_else(|| none_left("ports"))? }
        }
        Address::Fd(fd) => Address::Fd(fd.checked_add(job.into()).ok_or_else(|| none_left("descriptors"))?),
        Address::Unix(path) => {
            let text = path.to_str().ok_or("expected a path in UTF-8")?;
            if jobs > 1 && !text.contains(JOB) {
                return Err(format!(
                    "each job needs a socket of its own: write {JOB} into the path, for example a-{JOB}.sock"
                ));
            }
            Address::Unix(text.replace(JOB, &(job + 1).to_string()).into())
        }
        _ => return Err(SINGLE.into()),
    })
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

const SINGLE: &str = "it is one connection, and --dir takes one machine after another";
/// It is replaced by the number of the job in a path.
const JOB: &str = "{job}";
/// A shell takes one digit as the number of a descriptor.
const SHELL_MOST: i32 = 9;

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str, jobs: u16) -> Result<Vec<String>, String> {
        match ListenAddress::parse(text).expect(text).of_jobs(Some(jobs)) {
            Ok(all) => Ok(all.iter().map(ToString::to_string).collect()),
            Err(Failure::Usage(why)) => Err(why.source().expect("a cause").to_string()),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_job_has_an_address_of_its_own() {
        assert_eq!(all("tcp::4444,ipv4=on", 2).unwrap(), ["tcp::4444,ipv4=on", "tcp::4445,ipv4=on"]);
        assert_eq!(all("tcp::0", 2).unwrap(), ["tcp::0", "tcp::0"]);
        assert_eq!(all("vsock:2:5", 2).unwrap(), ["vsock:2:5", "vsock:2:6"]);
        assert_eq!(all("fd:3", 2).unwrap(), ["fd:3", "fd:4"]);
        assert_eq!(all("unix:/run/{job}.sock", 2).unwrap(), ["unix:/run/1.sock", "unix:/run/2.sock"]);
        assert_eq!(all("unix:/run/sock", 1).unwrap(), ["unix:/run/sock"]);
    }

    #[test]
    fn address_that_is_not_enough_for_the_jobs_is_refused_with_the_reason() {
        for (text, why) in [
            ("tcp::65535", "no 2 ports"),
            ("fd:2147483647", "no 2 descriptors"),
            ("unix:/run/sock", "write {job} into the path"),
            ("exec:true", "one connection"),
            ("-", "one connection"),
        ] {
            let refused = all(text, 2).expect_err(text);
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }
}
