//! How a source sends.

use std::time::Duration;

use super::parameters::{CONNECT_TIMEOUT, MULTIFD_CHANNELS, STALL_TIMEOUT};
use crate::{
    channel::{Context, Stop},
    compress::{Levels, Method},
    error::{Result, Usage},
    wire::VmUuid,
};

/// How a source sends.
///
/// With feature `serde` an object of the parameters' names, times in milliseconds. What is missing has its default, what
/// is unknown or outside its range is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(
        try_from = "crate::options::settings::SendSettings",
        into = "crate::options::settings::SendSettings"
    )
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
            channels: MULTIFD_CHANNELS.default_small(),
            uuid: VmUuid::NIL,
            method: Method::None,
            levels: Levels::default(),
            connect_timeout: CONNECT_TIMEOUT.default_time(),
            stall_timeout: Some(STALL_TIMEOUT.default_time()),
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

    /// How hard `method` tries: `multifd-zlib-level`, 0 (stored) to 9 (smallest); `multifd-zstd-level`, 1 (fastest) to 20
    /// (smallest), 0 is zstd's own default. Default 1. Of no effect if another method is chosen, or if it has no
    /// [level](Method::level). A channel with zstd takes 1 MiB of memory at level 1, 14 MiB at 9 and 190 MiB at 20; at
    /// the destination 32 MiB at most.
    pub fn level(mut self, method: Method, level: u8) -> Self {
        self.levels.set(method, level);
        self
    }

    /// How long a channel may take to connect. Default 30 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How long the destination may accept no data, on any connection, while a channel has data for it. Default 120 s;
    /// `None` is without limit, as in QEMU. A destination that is slow never reaches the limit.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// `zero-copy-send`: the network card reads pages where they are. Default off. It needs plain TCP, no compression, and
    /// permission to lock memory: 4 MiB per channel (`RLIMIT_MEMLOCK`). It saves a copy if the card and its driver support
    /// it, and costs time if they do not: see [`missed_zero_copy`](crate::ChannelStats::missed_zero_copy).
    pub fn zero_copy_send(mut self, on: bool) -> Self {
        self.zero_copy_send = on;
        self
    }

    /// Refuses options that have no effect in a migration without channels.
    ///
    /// # Errors
    /// [`Usage::WithoutChannels`], [`Usage::ZeroCopy`].
    pub fn check_without_channels(&self) -> Result<(), Usage> {
        if self.method != Method::None {
            return Err(Usage::WithoutChannels("multifd-compression"));
        }
        if self.zero_copy_send {
            return Err(Usage::ZeroCopy("with multifd-channels 0"));
        }
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.zero_copy_send && self.method != Method::None {
            return Err(Usage::ZeroCopy("with multifd-compression").into());
        }
        self.levels.check()?;
        Ok(MULTIFD_CHANNELS.check(self.channels)?)
    }
}
