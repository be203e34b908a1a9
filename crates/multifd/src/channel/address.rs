//! Addresses to connect to or listen on, in QEMU's notation.

use std::{
    fmt,
    net::Ipv6Addr,
    os::{fd::RawFd, unix::ffi::OsStrExt},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

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
                    let seconds = number(value, USER_TIMEOUT_MOST.into());
                    let seconds = seconds.map_err(|_| refused("0 to 86400 seconds"))?;
                    parsed.user_timeout = (seconds > 0).then(|| Duration::from_secs(seconds));
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
        let parsed = match text.split_once(':') {
            Some(("tcp", rest)) => Self::parse_tcp(rest),
            Some(("unix", rest)) => Ok(Self::Unix(rest.into())),
            Some(("vsock", rest)) => Self::parse_vsock(rest),
            Some(("exec", rest)) => Ok(Self::Exec(rest.to_owned())),
            Some(("fd", rest)) => match number(rest, FD_MOST) {
                Ok(fd) => Ok(Self::Fd(i32::try_from(fd).unwrap_or(i32::MAX))),
                Err(why) => Err(Why::Text(format!("the descriptor {why}"))),
            },
            _ => Err(Why::Text(match Self::from_str(&format!("tcp:{text}")) {
                Ok(meant) => format!("{FORMS}; did you mean {meant}?"),
                Err(_) => FORMS.to_owned(),
            })),
        };
        let refused = |why| Usage::Address { found: text.to_owned(), why };
        let address = parsed.map_err(|why| match why {
            Why::Text(why) => refused(why),
            Why::Option(usage) => usage,
        })?;
        match address.why_impossible() {
            None => Ok(address),
            Some(why) => Err(refused(why)),
        }
    }
}

/// Why a text is no address.
enum Why {
    Text(String),
    Option(Usage),
}

impl From<String> for Why {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Address {
    fn parse_tcp(rest: &str) -> Result<Self, Why> {
        let mut parts = rest.split(',');
        let at = parts.next().unwrap_or_default();
        let (host, port) = if let Some(bracketed) = at.strip_prefix('[') {
            let (host, port) =
                bracketed.split_once(']').ok_or_else(|| "the bracket ] is missing".to_owned())?;
            if !is_ipv6(host) {
                return Err(format!("expected an IPv6 address in brackets, found {host:?}").into());
            }
            (host, port.strip_prefix(':').unwrap_or(port))
        } else {
            let (host, port) = at.rsplit_once(':').ok_or_else(|| NO_PORT.to_owned())?;
            if host.contains(':') {
                return Err(BRACKETS.to_owned().into());
            }
            (host, port)
        };
        if port.is_empty() {
            return Err(NO_PORT.to_owned().into());
        }
        let port = number(port, u16::MAX.into()).map_err(|why| format!("port {why}"))?;
        let options = TcpOptions::parse(parts).map_err(Why::Option)?;
        Ok(Self::Tcp { host: host.to_owned(), port: u16::try_from(port).unwrap_or(u16::MAX), options })
    }

    fn parse_vsock(rest: &str) -> Result<Self, Why> {
        let missing = || "port missing: expected vsock:CID:PORT".to_owned();
        let (cid, port) = rest.split_once(':').filter(|(_, port)| !port.is_empty()).ok_or_else(missing)?;
        let cid = match cid {
            "" => Self::CID_ANY.into(),
            cid => number(cid, u32::MAX.into()).map_err(|why| format!("context id {why}"))?,
        };
        let port = number(port, u32::MAX.into()).map_err(|why| format!("port {why}"))?;
        let fitting = |number| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Self::Vsock { cid: fitting(cid), port: fitting(port) })
    }

    /// Why there can be no such address: what the parser would refuse, in a value that was made without it.
    pub(super) fn why_impossible(&self) -> Option<String> {
        let why = match self {
            Self::Tcp { host, .. } if host.contains(':') && !is_ipv6(host) => BRACKETS,
            Self::Tcp { host, .. } if host.contains(['[', ']', ',', '\0', ' ', '/']) => {
                "expected a host name or an IP address as the host"
            }
            Self::Unix(path) if path.as_os_str().is_empty() => "path missing: expected unix:PATH",
            Self::Unix(path) if path.as_os_str().as_bytes().contains(&0) => {
                "a path cannot contain a NUL byte"
            }
            Self::Unix(path) if path.as_os_str().len() > PATH_MOST => {
                let found = path.as_os_str().len();
                return Some(format!("the path has {found} bytes, and a unix socket can have {PATH_MOST}"));
            }
            Self::Exec(command) if command.is_empty() => "command missing: expected exec:COMMAND",
            Self::Exec(command) if command.contains('\0') => "a command cannot contain a NUL byte",
            Self::Fd(fd) if *fd < 0 => "a descriptor cannot be negative",
            Self::Tcp { options, .. } => return options.why_impossible(),
            Self::Unix(_) | Self::Vsock { .. } | Self::Exec(_) | Self::Fd(_) => return None,
        };
        Some(why.to_owned())
    }
}

impl TcpOptions {
    fn why_impossible(&self) -> Option<String> {
        let no_family = !self.uses_ipv4() && !self.uses_ipv6();
        let seconds = Duration::from_secs(1)..=Duration::from_secs(USER_TIMEOUT_MOST.into());
        let timeout = self.user_timeout.filter(|timeout| !seconds.contains(timeout));
        match timeout {
            _ if no_family => Some("expected one of IPv4 and IPv6 to be left".to_owned()),
            Some(found) => Some(format!("expected a user-timeout of 1 s to 86400 s, found {found:?}")),
            None => None,
        }
    }
}

/// Whether it is an IPv6 address, which may have a zone: `fe80::1%eth0`.
fn is_ipv6(host: &str) -> bool {
    let (address, zone) = host.split_once('%').map_or((host, None), |(address, zone)| (address, Some(zone)));
    address.parse::<Ipv6Addr>().is_ok() && zone != Some("")
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

/// Parses digits only, no sign and no space, up to `most`; or says what is wrong.
fn number(text: &str, most: u64) -> Result<u64, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{text:?} is not a number"));
    }
    match text.parse() {
        Ok(number) if number <= most => Ok(number),
        _ => Err(format!("{text} is above {most}")),
    }
}

const USER_TIMEOUT: Duration = Duration::from_secs(90);
/// A day.
const USER_TIMEOUT_MOST: u32 = 24 * 60 * 60;
/// The bytes of a path in the address of a unix socket, without the NUL after it.
const PATH_MOST: usize = 107;
/// The greatest number of a descriptor.
const FD_MOST: u64 = 0x7fff_ffff;
const FORMS: &str = "expected an address like tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, exec:COMMAND or fd:N";
const NO_PORT: &str = "port missing: expected tcp:HOST:PORT";
const BRACKETS: &str = "an IPv6 address needs brackets: tcp:[::1]:PORT";
const KNOWN: &str = "one of ipv4=on|off, ipv6=on|off, keep-alive=on|off, user-timeout=SECONDS";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Connect, Context, Listener, Stop};

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
    fn what_is_no_address_is_refused_with_the_part_that_is_wrong() {
        let long = format!("unix:/{}", "x".repeat(107));
        for (text, told) in [
            ("", FORMS),
            ("vm.ram", FORMS),
            ("rdma:host:1", FORMS),
            ("host:80", "exec:COMMAND or fd:N; did you mean tcp:host:80?"),
            ("127.0.0.1:4444", "did you mean tcp:127.0.0.1:4444?"),
            (":4444", "did you mean tcp::4444?"),
            ("tcp:", "port missing: expected tcp:HOST:PORT"),
            ("tcp:host", "port missing"),
            ("tcp:host:", "port missing"),
            ("tcp:[::1]", "port missing"),
            ("tcp:[::1]:", "port missing"),
            ("tcp:host,ipv4", "port missing"),
            ("tcp:host:65536", "port 65536 is above 65535"),
            ("tcp:host:99999999999999999999999", "port 99999999999999999999999 is above 65535"),
            ("tcp:host:+1", r#"port "+1" is not a number"#),
            ("tcp:host:http", r#"port "http" is not a number"#),
            ("tcp:[::1]80:1", r#"port "80:1" is not a number"#),
            ("tcp:::1:80", "an IPv6 address needs brackets: tcp:[::1]:PORT"),
            ("tcp:fe80::1:80", "an IPv6 address needs brackets"),
            ("tcp:[::1:80", "the bracket ] is missing"),
            ("tcp:[host]:80", r#"expected an IPv6 address in brackets, found "host""#),
            ("tcp:[::1%]:80", "expected an IPv6 address in brackets"),
            ("tcp:a host:80", "expected a host name or an IP address"),
            ("tcp://host:80", "expected a host name or an IP address"),
            ("unix:", "path missing: expected unix:PATH"),
            (&long, "the path has 108 bytes, and a unix socket can have 107"),
            ("fd:", r#"the descriptor "" is not a number"#),
            ("fd:-1", r#"the descriptor "-1" is not a number"#),
            ("fd:x", r#"the descriptor "x" is not a number"#),
            ("fd:2147483648", "the descriptor 2147483648 is above 2147483647"),
            ("exec:", "command missing: expected exec:COMMAND"),
            ("vsock:3", "port missing: expected vsock:CID:PORT"),
            ("vsock:3:", "port missing: expected vsock:CID:PORT"),
            ("vsock:3:x", r#"port "x" is not a number"#),
            ("vsock:-1:5000", r#"context id "-1" is not a number"#),
            ("vsock:4294967296:1", "context id 4294967296 is above 4294967295"),
            ("vsock:1:4294967296", "port 4294967296 is above 4294967295"),
        ] {
            let refused = text.parse::<Address>().expect_err(text).to_string();
            assert!(refused.starts_with(&format!("address {text:?}: ")), "{refused}");
            assert!(refused.contains(told), "{refused}");
        }
        assert!("tcp:[fe80::1%eth0]:80".parse::<Address>().is_ok(), "an address with a zone");
    }

    /// An embedder can make values that the parser would refuse.
    #[test]
    fn value_that_the_parser_would_refuse_is_refused_where_it_is_opened() {
        let tcp = |host: &str, options: TcpOptions| Address::Tcp { host: host.into(), port: 1, options };
        let plain = TcpOptions::default;
        let off = TcpOptions { ipv4: Some(false), ipv6: Some(false), ..plain() };
        let timeout = |timeout| TcpOptions { user_timeout: Some(timeout), ..plain() };
        for address in [
            tcp("a:b", plain()),
            tcp("[::1]", plain()),
            tcp("a b", plain()),
            tcp("a\0b", plain()),
            tcp("a,ipv4=on", plain()),
            tcp("::1", off),
            tcp("::1", timeout(Duration::ZERO)),
            tcp("::1", timeout(Duration::from_millis(999))),
            tcp("::1", timeout(Duration::MAX)),
            Address::Unix(PathBuf::new()),
            Address::Unix("\0hidden".into()),
            Address::Unix("x".repeat(108).into()),
            Address::Exec(String::new()),
            Address::Exec("a\0b".into()),
            Address::Fd(-1),
            Address::Fd(RawFd::MIN),
        ] {
            let context = Context::new(&Stop::new());
            for refused in [
                address.check_connect(),
                address.check_listen(),
                address.connect(&context).map(drop).map_err(of),
                Listener::bind(&address).map(drop).map_err(of),
            ] {
                let refused = refused.expect_err("refused");
                assert!(matches!(refused, Usage::Address { .. }), "{address:?}: {refused}");
            }
        }
    }

    fn of(error: std::io::Error) -> Usage {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Usage>());
        inner.cloned().unwrap_or_else(|| panic!("{error:?}"))
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
