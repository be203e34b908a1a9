//! How a destination receives.

use std::time::Duration;

use super::{
    ChannelCount, ChannelsFrom,
    parameters::{CHANNELS_TIMEOUT, DECOMPRESSION_MEMORY, DRAIN_TIMEOUT, GREETING_TIMEOUT, STALL_TIMEOUT},
};
use crate::{compress::Method, wire::VmUuid};

/// How a destination receives.
///
/// With feature `serde` an object of the parameters' names, times in milliseconds. What is missing has its default, what
/// is unknown or outside its range is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(
        try_from = "crate::options::settings::ReceiveSettings",
        into = "crate::options::settings::ReceiveSettings"
    )
)]
#[must_use]
pub struct ReceiveOptions {
    pub(crate) channels: ChannelCount,
    pub(crate) channels_from: ChannelsFrom,
    pub(crate) uuid: Option<VmUuid>,
    pub(crate) method: Option<Method>,
    pub(crate) decompression_memory: Option<u64>,
    pub(crate) greeting_timeout: Duration,
    pub(crate) channels_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) stall_timeout: Option<Duration>,
    pub(crate) accept_timeout: Option<Duration>,
    pub(crate) max_refused: Option<u64>,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            channels: ChannelCount::Auto,
            channels_from: ChannelsFrom::MainHost,
            uuid: None,
            method: None,
            decompression_memory: Some(DECOMPRESSION_MEMORY.default),
            greeting_timeout: GREETING_TIMEOUT.default_time(),
            channels_timeout: CHANNELS_TIMEOUT.default_time(),
            drain_timeout: DRAIN_TIMEOUT.default_time(),
            stall_timeout: Some(STALL_TIMEOUT.default_time()),
            accept_timeout: None,
            max_refused: None,
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

    /// The memory in bytes that the decompression of all channels together may take for zstd windows, which are as large as
    /// the source's level asks for. Default 512 MiB: 255 channels up to level 8, 128 up to level 16, 64 up to level 19, 16 at level 20. A source that needs more is
    /// refused with [`Unsupported::DecoderMemory`](crate::error::Unsupported::DecoderMemory). `None` is without limit: up to
    /// 255 windows of 32 MiB.
    pub fn decompression_memory(mut self, bytes: Option<u64>) -> Self {
        self.decompression_memory = bytes;
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

    /// How long the source may take to close its channels after everything has arrived. Default 5 s; then this side closes
    /// them.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.drain_timeout = limit;
        self
    }

    /// How long the source may send nothing, on any connection, while a channel or main waits at a sync point for the
    /// others. Default 120 s; `None` is without limit, as in QEMU. Between sync points a source may be silent without limit.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// How long [`Receiver::wait_main`](crate::Receiver::wait_main) waits for a source. Default `None`: without limit, as in
    /// QEMU. A connection that is refused, or that is silent, does not extend the time.
    pub fn accept_timeout(mut self, limit: Option<Duration>) -> Self {
        self.accept_timeout = limit;
        self
    }

    /// The number of refused connections that ends the wait for a source, with [`Error::TooManyRefused`]: a failed TLS
    /// handshake, a connection that is neither main nor a channel, or one that does not identify itself within
    /// `greeting_timeout`. Connections that are closed to make room for others, and those after main has connected, do not
    /// count. Default `None` or 0: without limit.
    ///
    /// **Warning:** with a limit, anybody who can connect can end the wait.
    ///
    /// [`Error::TooManyRefused`]: crate::error::Error::TooManyRefused
    pub fn max_refused(mut self, most: Option<u64>) -> Self {
        self.max_refused = most.filter(|most| *most > 0);
        self
    }
}
