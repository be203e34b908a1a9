//! Addresses to connect to or listen on, in QEMU's notation.

use std::{fmt, os::fd::RawFd, path::PathBuf, str::FromStr, time::Duration};

use crate::error::Usage;

/// A migration address: `tcp:HOST:PORT[,OPTION…]`, `unix:PATH`, `vsock:CID:PORT`, `exec:COMMAND` or `fd:N`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A host name or IP address and a port. An IPv6 address is written in brackets. An empty host means every address
    /// when listening and the local host when connecting; port 0 lets the system choose.
    Tcp {
        /// Without brackets.
        host: String,
        /// The port.
        port: u16,
        /// The options after the port.
        options: TcpOptions,
    },
    /// A unix socket.
    Unix(PathBuf),
    /// A virtual socket between a host and its guests.
    Vsock {
        /// The context id of the listening machine: 2 is the host. When listening, [`CID_ANY`](Self::CID_ANY) is every
        /// id of this machine; it may be omitted: `vsock::PORT`.
        cid: u32,
        /// The port; when listening, 4294967295 lets the system choose.
        port: u32,
    },
    /// A shell command whose standard input and output are the one connection of a migration without channels. `/bin/sh
    /// -c` runs it; its standard error is this process's. See [`Stream::finish`](super::Stream::finish) for its exit
    /// status.
    ///
    /// **Warning:** only the exit status shows a source whether the destination has the guest. No other code in this
    /// process may take it: `SIGCHLD` must not be ignored (`SIG_IGN`, `SA_NOCLDWAIT`), which is refused before the
    /// command is started, and no other part may wait for any child (`waitpid` with -1, a reaper of orphans). If one
    /// does, Linux 6.15 and later still report the status. On earlier versions the migration fails with
    /// [`ExitStatusUnknown`](super::ExitStatusUnknown), although the destination may have the guest: check the
    /// destination before the guest continues on the source.
    Exec(String),
    /// A descriptor inherited from the parent process: a listening socket, or the one connection of a
    /// migration without channels.
    Fd(RawFd),
}

impl Address {
    /// Every context id of this machine.
    pub const CID_ANY: u32 = u32::MAX;
}

/// The options after the port of a `tcp:` address: `,ipv4=on,keep-alive=off`.
///
/// `on` may be omitted: `,ipv4`. If one family is on, the other is off unless it is on too; if one is off, the other is
/// used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TcpOptions {
    /// `ipv4`: whether IPv4 is used. The default follows from `ipv6`; both are used if neither is given.
    pub ipv4: Option<bool>,
    /// `ipv6`: whether IPv6 is used. The default follows from `ipv4`; both are used if neither is given.
    pub ipv6: Option<bool>,
    /// `keep-alive`: whether a silent connection is probed, so that a lost host is noticed. Default on.
    pub keep_alive: bool,
    /// `user-timeout`, in seconds: how long a host may leave data and probes unanswered before the connection fails.
    /// Default 90 s; `None`, written 0, uses the system's limit of about a quarter of an hour. A peer whose host
    /// answers never fails this way, however long it reads nothing.
    pub user_timeout: Option<Duration>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { ipv4: None, ipv6: None, keep_alive: true, user_timeout: Some(USER_TIMEOUT) }
    }
}

impl TcpOptions {
    /// Whether IPv4 is used.
    pub fn uses_ipv4(&self) -> bool {
        self.ipv4.unwrap_or(self.ipv6 != Some(true))
    }

    /// Whether IPv6 is used.
    pub fn uses_ipv6(&self) -> bool {
        self.ipv6.unwrap_or(self.ipv4 != Some(true))
    }

    fn parse<'a>(options: impl Iterator<Item = &'a str>) -> Result<Self, Usage> {
        let mut parsed = Self::default();
        let mut seen = Vec::new();
        for option in options {
            let refused = |expected| Usage::AddressOption { expected, found: option.to_owned() };
            let (name, value) = option.split_once('=').unwrap_or((option, "on"));
            let switch = || match value {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err(refused("on or off")),
            };
            match name {
                "ipv4" => parsed.ipv4 = Some(switch()?),
                "ipv6" => parsed.ipv6 = Some(switch()?),
                "keep-alive" => parsed.keep_alive = switch()?,
                "user-timeout" => {
                    let seconds = number::<u32>(value).filter(|seconds| *seconds <= USER_TIMEOUT_MOST);
                    let seconds = seconds.ok_or_else(|| refused("0 to 86400 seconds"))?;
                    parsed.user_timeout = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
                }
                _ => return Err(refused(KNOWN)),
            }
            if seen.contains(&name) {
                return Err(refused("each option once"));
            }
            seen.push(name);
        }
        if !parsed.uses_ipv4() && !parsed.uses_ipv6() {
            let found = "ipv4=off,ipv6=off".into();
            return Err(Usage::AddressOption { expected: "at least one of IPv4 and IPv6 to be on", found });
        }
        Ok(parsed)
    }
}

impl fmt::Display for TcpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = Self::default();
        let word = |on| if on { "on" } else { "off" };
        for (name, switch) in [("ipv4", self.ipv4), ("ipv6", self.ipv6)] {
            if let Some(on) = switch {
                write!(f, ",{name}={}", word(on))?;
            }
        }
        if self.keep_alive != plain.keep_alive {
            write!(f, ",keep-alive={}", word(self.keep_alive))?;
        }
        if self.user_timeout != plain.user_timeout {
            write!(f, ",user-timeout={}", self.user_timeout.unwrap_or_default().as_secs())?;
        }
        Ok(())
    }
}

impl FromStr for Address {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Self, Usage> {
        let refused = || Usage::Address(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(refused)?;
        match kind {
            "tcp" => {
                let mut parts = rest.split(',');
                let (host, port) = parts.next().and_then(|at| at.rsplit_once(':')).ok_or_else(refused)?;
                let host = match host.strip_prefix('[') {
                    Some(bracketed) => bracketed.strip_suffix(']').ok_or_else(refused)?,
                    None if host.contains(':') => return Err(refused()),
                    None => host,
                };
                let port = number(port).ok_or_else(refused)?;
                Ok(Self::Tcp { host: host.to_owned(), port, options: TcpOptions::parse(parts)? })
            }
            "unix" if !rest.is_empty() => Ok(Self::Unix(rest.into())),
            "vsock" => {
                let (cid, port) = rest.split_once(':').ok_or_else(refused)?;
                let cid = if cid.is_empty() { Some(Self::CID_ANY) } else { number(cid) };
                let (cid, port) = cid.zip(number(port)).ok_or_else(refused)?;
                Ok(Self::Vsock { cid, port })
            }
            "exec" if !rest.is_empty() => Ok(Self::Exec(rest.to_owned())),
            "fd" => rest.parse().ok().filter(|fd| *fd >= 0).map(Self::Fd).ok_or_else(refused),
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port, options } if host.contains(':') => {
                write!(f, "tcp:[{host}]:{port}{options}")
            }
            Self::Tcp { host, port, options } => write!(f, "tcp:{host}:{port}{options}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// Parses digits only: no sign, no space.
fn number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

const USER_TIMEOUT: Duration = Duration::from_secs(90);
/// A day.
const USER_TIMEOUT_MOST: u32 = 24 * 60 * 60;
const KNOWN: &str = "one of ipv4=on|off, ipv6=on|off, keep-alive=on|off, user-timeout=SECONDS";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_written() {
        for text in [
            "tcp:127.0.0.1:4444",
            "tcp:[::1]:0",
            "tcp:host.example:65535",
            "tcp::4444",
            "tcp:host:1,ipv4=on,ipv6=off,keep-alive=off,user-timeout=0",
            "tcp:[::1]:1,ipv6=on,user-timeout=7",
            "unix:/run/x:y",
            "unix:/run/x,ipv4=on",
            "vsock:3:5000",
            "vsock:4294967295:4294967295",
            "exec:cat >'a file', or:so",
            "fd:3",
        ] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_forms_that_are() {
        for text in [
            "",
            "tcp:",
            "tcp:host",
            "tcp:host:",
            "tcp:host:65536",
            "tcp:host:+1",
            "tcp:::1:80",
            "tcp:[::1:80",
            "unix:",
            "fd:",
            "fd:-1",
            "fd:x",
            "exec:",
            "vsock:3",
            "vsock:3:x",
            "vsock:-1:5000",
            "vsock:any:5000",
            "vsock:4294967296:1",
            "host:80",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        let refused = "tcp:host".parse::<Address>().expect_err("refused");
        assert_eq!(
            refused.to_string(),
            r#"expected an address like tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, exec:COMMAND or fd:N, found "tcp:host""#
        );
    }

    fn families(options: &str) -> Result<(bool, bool), String> {
        match format!("tcp::0{options}").parse::<Address>() {
            Ok(Address::Tcp { options, .. }) => Ok((options.uses_ipv4(), options.uses_ipv6())),
            Ok(other) => Err(format!("{other:?}")),
            Err(refused) => Err(refused.to_string()),
        }
    }

    /// As observed with QEMU 7.2 and 10.0, from the sockets on which they listened.
    #[test]
    fn families_are_chosen_as_by_qemu() {
        assert_eq!(families(""), Ok((true, true)));
        assert_eq!(families(",ipv4=on"), Ok((true, false)));
        assert_eq!(families(",ipv4"), Ok((true, false)));
        assert_eq!(families(",ipv6=on"), Ok((false, true)));
        assert_eq!(families(",ipv4=on,ipv6=on"), Ok((true, true)));
        assert_eq!(families(",ipv6=off"), Ok((true, false)));
        assert_eq!(families(",ipv4=off"), Ok((false, true)));
        assert_eq!(families(",ipv4=on,ipv6=off"), Ok((true, false)));
    }

    #[test]
    fn option_that_cannot_be_is_refused_by_name() {
        for (options, told) in [
            (
                ",ipv4=off,ipv6=off",
                r#"expected at least one of IPv4 and IPv6 to be on, found "ipv4=off,ipv6=off""#,
            ),
            (",ipv4=yes", r#"expected on or off, found "ipv4=yes""#),
            (
                ",to=4450",
                r#"expected one of ipv4=on|off, ipv6=on|off, keep-alive=on|off, user-timeout=SECONDS, found "to=4450""#,
            ),
            (",ipv4=on,", r#"user-timeout=SECONDS, found """#),
            (",ipv4=on,ipv4=off", r#"expected each option once, found "ipv4=off""#),
            (",user-timeout=86401", r#"expected 0 to 86400 seconds, found "user-timeout=86401""#),
            (",user-timeout=-1", "0 to 86400"),
        ] {
            let refused = families(options).expect_err(options);
            assert!(refused.starts_with("address option: expected ") && refused.contains(told), "{refused}");
        }
    }

    #[test]
    fn context_id_may_be_left_out_for_every_one() {
        let any = "vsock::5000".parse::<Address>().expect("an address");
        assert_eq!(any, Address::Vsock { cid: Address::CID_ANY, port: 5000 });
        assert_eq!(any.to_string(), "vsock:4294967295:5000");
    }
}
