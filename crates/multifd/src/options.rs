//! What can be chosen, a struct for each side, with defaults that work with a default QEMU.

use std::{fmt, net::IpAddr, str::FromStr, time::Duration};

use crate::{
    channel::{Context, Host, Stop},
    compress::{Levels, Method},
    error::{Result, Usage},
    parameters,
    wire::{VmUuid, limits},
};

/// How a source sends.
///
/// With feature `serde` an object of the parameters' names, times in milliseconds. What is missing has its default, what
/// is unknown or outside its range is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "crate::settings::SendSettings", into = "crate::settings::SendSettings")
)]
#[must_use]
pub struct SendOptions {
    pub(crate) channels: u8,
    pub(crate) uuid: VmUuid,
    pub(crate) method: Method,
    pub(crate) levels: Levels,
    pub(crate) connect_timeout: Duration,
    pub(crate) stall_timeout: Option<Duration>,
    pub(crate) zero_copy_send: bool,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self {
            channels: 2,
            uuid: VmUuid::NIL,
            method: Method::None,
            levels: Levels::default(),
            connect_timeout: Context::CONNECT_TIMEOUT,
            stall_timeout: Some(STALL_TIMEOUT),
            zero_copy_send: false,
        }
    }
}

impl SendOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// What each channel is connected with.
    pub(crate) fn context(&self, stop: &Stop) -> Context {
        let context = Context::new(stop).connect_timeout(self.connect_timeout).channels(self.channels);
        context.stall_timeout(self.stall_timeout)
    }

    /// `multifd-channels`: the number of channels, 1 to 255. Default 2. Must be the destination's number. Each
    /// costs a thread, a connection and four batches (12 KiB); more than there are cores seldom helps.
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = channels;
        self
    }

    /// The machine's UUID, which a QEMU destination compares with its own. Default nil, as for a machine that
    /// was given none.
    pub fn uuid(mut self, uuid: VmUuid) -> Self {
        self.uuid = uuid;
        self
    }

    /// `multifd-compression`. Default none. Must be the destination's method. The others cost CPU time on both
    /// sides, a buffer of 1 MiB a channel and the method's own state; they pay where the network is slow.
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// `multifd-zlib-level`, 0 (stored) to 9 (smallest). Default 1. Of no matter with another method.
    pub fn zlib_level(mut self, level: u8) -> Self {
        self.levels.zlib = level;
        self
    }

    /// `multifd-zstd-level`, 1 (fastest) to 20 (smallest), 0 is zstd's own default. Default 1. Of no matter with
    /// another method. A channel costs 1 MiB of memory at level 1, 14 at 9 and 190 at 20; at the destination 32 at the
    /// most.
    pub fn zstd_level(mut self, level: u8) -> Self {
        self.levels.zstd = level;
        self
    }

    /// How long a channel may take to connect. Default 30 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How long the destination may take nothing in, on any connection, while a channel has something for it. Default 120
    /// s; `None` is for ever, as QEMU waits. A destination that is slow, however slow, is not given up.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// `zero-copy-send`: has the network card read pages where they are. Default off. It needs plain TCP, pages that are
    /// not packed, and leave to lock memory: 4 MiB a channel (`RLIMIT_MEMLOCK`). It saves a copy where the card and the
    /// way to it can, and costs where they cannot: [`missed_zero_copy`](crate::ChannelStats::missed_zero_copy) tells.
    pub fn zero_copy_send(mut self, on: bool) -> Self {
        self.zero_copy_send = on;
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.zero_copy_send && self.method != Method::None {
            return Err(Usage::ZeroCopy("with multifd-compression").into());
        }
        self.levels.check()?;
        Ok(parameters::MULTIFD_CHANNELS.check(self.channels)?)
    }
}

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

/// Where the connections that a destination takes for channels may come from. A connection from elsewhere is dropped with a
/// warning, whatever it says.
///
/// As text: `main`, `any`, or IP addresses with commas between them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelsFrom {
    /// From where the main connection comes: the same IP address, vsock context or, for a unix socket, process. What cannot
    /// be told apart is taken: a link without a [host](crate::channel::Link::host), guests behind one proxy. Default.
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
            _ => hosts().map(Self::Hosts).map_err(|_| Usage::ChannelsFrom { met: text.into() }),
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

/// How a destination receives.
///
/// With feature `serde` an object of the parameters' names, times in milliseconds. What is missing has its default, what
/// is unknown or outside its range is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "crate::settings::ReceiveSettings", into = "crate::settings::ReceiveSettings")
)]
#[must_use]
pub struct ReceiveOptions {
    pub(crate) channels: ChannelCount,
    pub(crate) channels_from: ChannelsFrom,
    pub(crate) uuid: Option<VmUuid>,
    pub(crate) method: Option<Method>,
    pub(crate) greeting_timeout: Duration,
    pub(crate) channels_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) stall_timeout: Option<Duration>,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            channels: ChannelCount::Auto,
            channels_from: ChannelsFrom::MainHost,
            uuid: None,
            method: None,
            greeting_timeout: Duration::from_secs(10),
            channels_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(5),
            stall_timeout: Some(STALL_TIMEOUT),
        }
    }
}

impl ReceiveOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// `multifd-channels`: the number of channels, or to learn it from the source. Default
    /// [`ChannelCount::Auto`].
    pub fn channels(mut self, channels: ChannelCount) -> Self {
        self.channels = channels;
        self
    }

    /// Where channels may come from. Default [`ChannelsFrom::MainHost`].
    pub fn channels_from(mut self, from: ChannelsFrom) -> Self {
        self.channels_from = from;
        self
    }

    /// The UUID that the source's channels must name. Default `None`: any, but all channels the same.
    pub fn uuid(mut self, uuid: Option<VmUuid>) -> Self {
        self.uuid = uuid;
        self
    }

    /// `multifd-compression`. Default `None`: the method that the first packet with pages names, of those built in
    /// ([`Method::ALL`]). A method given here is the only one taken.
    pub fn method(mut self, method: Option<Method>) -> Self {
        self.method = method;
        self
    }

    /// How long a new connection may take to say what it is. Default 10 s; then it is dropped.
    pub fn greeting_timeout(mut self, limit: Duration) -> Self {
        self.greeting_timeout = limit;
        self
    }

    /// How long the first sync point waits for channels that are on their way. Default 10 s.
    pub fn channels_timeout(mut self, limit: Duration) -> Self {
        self.channels_timeout = limit;
        self
    }

    /// How long, after everything has come, the source may take to close its channels. Default 5 s; then they are
    /// closed from here.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.drain_timeout = limit;
        self
    }
    /// How long the source may send nothing, on any connection, while a channel or main stands at a sync point and waits
    /// for the others. Default 120 s; `None` is for ever, as QEMU waits. Between sync points a source may be silent for as
    /// long as it likes.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }
}

/// Longer than the links of a network that is being repaired, and than [`TcpOptions`](crate::channel::TcpOptions) gives a
/// host that does not answer, so that the more exact error comes first.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);
