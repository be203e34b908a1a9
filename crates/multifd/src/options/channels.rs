//! Which channels a destination takes: how many, and from where.

use std::{fmt, net::IpAddr, str::FromStr};

use crate::{channel::Host, error::Usage, wire::limits};

/// How many channels a destination expects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChannelCount {
    /// As many as the source [announces](crate::Receiver::expect_channels). From a source that announces nothing, such
    /// as QEMU, as many as have connected when main comes to its first sync points.
    ///
    /// **Warning**: with such a source, behind a proxy, channels may connect later than that.
    #[default]
    Auto,
    /// This many, 0 to 255; 0 is multifd off.
    Exact(u8),
}

impl ChannelCount {
    /// The bound that channel ids stay below.
    pub(crate) fn most(self) -> u8 {
        match self {
            Self::Auto => limits::CHANNELS,
            Self::Exact(count) => count,
        }
    }
}

/// From where a destination accepts channels. A connection from elsewhere is dropped with a warning, whether it begins like
/// a channel or not.
///
/// As text: `main`, `any`, or IP addresses with commas between them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelsFrom {
    /// From where the main connection comes: the same IP address, vsock context or, for a unix socket, process. What cannot
    /// be distinguished is accepted: a link without a [host](crate::channel::Link::host), guests behind one proxy. Default.
    #[default]
    MainHost,
    /// From anywhere: for a source whose channels take another way than main.
    Any,
    /// From these IP addresses.
    Hosts(Vec<IpAddr>),
}

impl ChannelsFrom {
    /// Whether a channel may come from `host` when main comes from `main`.
    pub(crate) fn admits(&self, host: Option<Host>, main: Option<Host>) -> bool {
        match self {
            Self::MainHost => host.zip(main).is_none_or(|(host, main)| host == main),
            Self::Any => true,
            Self::Hosts(hosts) => hosts.iter().any(|listed| host == Some(Host::ip(*listed))),
        }
    }
}

impl FromStr for ChannelsFrom {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Self, Usage> {
        let hosts = || text.split(',').map(IpAddr::from_str).collect::<Result<_, _>>();
        match text {
            "main" => Ok(Self::MainHost),
            "any" => Ok(Self::Any),
            _ => hosts().map(Self::Hosts).map_err(|_| Usage::ChannelsFrom { found: text.into() }),
        }
    }
}

impl fmt::Display for ChannelsFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MainHost => f.write_str("main"),
            Self::Any => f.write_str("any"),
            Self::Hosts(hosts) => {
                let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
                f.write_str(&hosts.join(","))
            }
        }
    }
}
