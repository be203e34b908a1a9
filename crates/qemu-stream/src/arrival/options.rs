//! The options of a destination.

use std::{sync::Arc, time::Duration};

use multifd::ReceiveOptions;

use crate::incoming::{BeforeRefusal, Expected, LeftOut, PAUSE, SILENCE, STALL};

/// The options of a destination.
#[derive(Clone, Debug)]
#[must_use]
pub struct ArrivalOptions {
    pub(super) expected: Expected,
    pub(super) left_out: LeftOut,
    pub(super) receive: ReceiveOptions,
    pub(super) stall_timeout: Option<Duration>,
    pub(super) pause_timeout: Option<Duration>,
    pub(super) silence: Duration,
    pub(super) switchover_ack: bool,
    pub(super) suppress_vmdesc: bool,
    pub(super) send_reason: bool,
    pub(super) postcopy: bool,
    pub(super) channels_may_break: bool,
    #[cfg(feature = "fault")]
    pub(super) early: bool,
    pub(super) before_refusal: BeforeRefusal,
}

impl ArrivalOptions {
    /// Accepts an `expected` machine, over as many channels as the source has.
    pub fn new(expected: Expected) -> Self {
        Self {
            expected,
            left_out: LeftOut::default(),
            receive: ReceiveOptions::new(),
            stall_timeout: Some(STALL),
            pause_timeout: Some(PAUSE),
            silence: SILENCE,
            switchover_ack: false,
            suppress_vmdesc: false,
            send_reason: true,
            postcopy: false,
            channels_may_break: false,
            #[cfg(feature = "fault")]
            early: false,
            before_refusal: BeforeRefusal::default(),
        }
    }

    /// Whether the source may switch to post-copy: see [`Incoming::postcopy`](crate::incoming::Incoming::postcopy). Off by
    /// default.
    ///
    /// If the connection breaks after the switch, the source may return for as long as the [pause
    /// timeout](Self::pause_timeout) allows.
    ///
    /// **Warning:** if this side fails after the switch, or the source does not return, the guest can stay stopped at the source for
    /// good. Only its process still has it then.
    pub fn postcopy(mut self, on: bool) -> Self {
        self.postcopy = on;
        self
    }

    /// Whether the migration continues without a channel whose connection breaks before the guest moves, if the source has
    /// [it](crate::source::SourceOptions::channels_may_break) on, too. The source sends the pages of such a channel again. The last
    /// channel and main may not break. Off by default.
    pub fn channels_may_break(mut self, on: bool) -> Self {
        self.channels_may_break = on;
        self
    }

    /// Whether the guest runs here as soon as the source has switched to post-copy, before all of its RAM has arrived. The machine is then
    /// loaded with [`Announced::load_early`](super::Announced::load_early). Implies [`postcopy`](Self::postcopy). Off by default.
    #[cfg(feature = "fault")]
    pub fn run_early(mut self, on: bool) -> Self {
        self.early = on;
        self.postcopy |= on;
        self
    }

    /// Calls `call` when this side has failed after the switch to post-copy, before the source is informed. A program that controls
    /// the source cancels the migration there: QEMU 7.2 then gives its guest back, and refuses to do so once it is informed. By
    /// default nothing is called.
    pub fn before_postcopy_refusal(mut self, call: impl Fn() + Send + Sync + 'static) -> Self {
        self.before_refusal = BeforeRefusal(Some(Arc::new(move || {
            call();
            true
        })));
        self
    }

    /// What the source may leave out of RAM. Default: [`LeftOut::Ignored`].
    pub fn left_out(mut self, left_out: LeftOut) -> Self {
        self.left_out = left_out;
        self
    }

    /// How the channels are received. `stall_timeout` in `options` is replaced by the one set here.
    pub fn receive(mut self, options: ReceiveOptions) -> Self {
        self.receive = options;
        self
    }

    /// How long the source may send nothing, on any connection, while something is expected: see
    /// [`Incoming::stall_timeout`](crate::incoming::Incoming::stall_timeout). Default 120 s; `None` is no limit.
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// How long the source may be silent between two sections of RAM: see
    /// [`Incoming::pause_timeout`](crate::incoming::Incoming::pause_timeout). Default 3600 s; `None` is no limit.
    pub fn pause_timeout(mut self, limit: Option<Duration>) -> Self {
        self.pause_timeout = limit;
        self
    }

    /// See [`Incoming::silence`](crate::incoming::Incoming::silence). Default 10 s.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit;
        self
    }

    /// See [`Incoming::switchover_ack`](crate::incoming::Incoming::switchover_ack). Default off.
    pub fn switchover_ack(mut self, on: bool) -> Self {
        self.switchover_ack = on;
        self
    }

    /// See [`Incoming::suppress_vmdesc`](crate::incoming::Incoming::suppress_vmdesc). Default off.
    pub fn suppress_vmdesc(mut self, on: bool) -> Self {
        self.suppress_vmdesc = on;
        self
    }

    /// Whether a source of this library is sent the reason if this side refuses or fails: see
    /// [`Incoming::send_reason`](crate::incoming::Incoming::send_reason). Default on.
    pub fn send_reason(mut self, on: bool) -> Self {
        self.send_reason = on;
        self
    }
}
