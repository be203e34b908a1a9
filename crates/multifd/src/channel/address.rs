//! Where to connect to or listen at, written as QEMU writes it.

use std::{fmt, os::fd::RawFd, path::PathBuf, str::FromStr};

use crate::error::Usage;

/// A migration address: `tcp:HOST:PORT`, `unix:PATH` or `fd:N`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A host name or IP address and a port. An IPv6 address stands in brackets. An empty host is every
    /// address when listening and the local host when connecting; port 0 lets the system choose.
    Tcp {
        /// Without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
    /// A descriptor inherited from the parent process: a listening socket, or the one connection of a
    /// migration without channels.
    Fd(RawFd),
}

impl FromStr for Address {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Self, Usage> {
        let refused = || Usage::Address(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(refused)?;
        match kind {
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(refused)?;
                let host = match host.strip_prefix('[') {
                    Some(bracketed) => bracketed.strip_suffix(']').ok_or_else(refused)?,
                    None if host.contains(':') => return Err(refused()),
                    None => host,
                };
                let digits = port.bytes().all(|byte| byte.is_ascii_digit());
                let port = port.parse().ok().filter(|_| digits).ok_or_else(refused)?;
                Ok(Self::Tcp { host: host.to_owned(), port })
            }
            "unix" if !rest.is_empty() => Ok(Self::Unix(rest.into())),
            "fd" => rest.parse().ok().filter(|fd| *fd >= 0).map(Self::Fd).ok_or_else(refused),
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

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
            "unix:/run/x:y",
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
            "exec:cat",
            "host:80",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        let refused = "tcp:host".parse::<Address>().expect_err("refused");
        assert_eq!(
            refused.to_string(),
            r#"expected an address like tcp:HOST:PORT, unix:PATH or fd:N, met "tcp:host""#
        );
    }
}
