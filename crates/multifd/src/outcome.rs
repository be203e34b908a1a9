//! The state and the outcome of a migration: plain data in errors and in the results of passes.

use std::{fmt, time::Duration};

/// A callback that the embedder implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Callback {
    /// [`Guest::devices`](crate::live::Guest::devices).
    GuestDevices,
    /// [`Guest::can_throttle`](crate::live::Guest::can_throttle).
    GuestCanThrottle,
    /// [`Guest::throttle`](crate::live::Guest::throttle).
    GuestThrottle,
    /// [`Guest::run_state`](crate::live::Guest::run_state).
    GuestRunState,
    /// [`Guest::stop`](crate::live::Guest::stop).
    GuestStop,
    /// [`Guest::save`](crate::live::Guest::save).
    GuestSave,
    /// [`Guest::resume`](crate::live::Guest::resume).
    GuestResume,
    /// [`DirtyLog::begin`](crate::ram::DirtyLog::begin).
    DirtyLogBegin,
    /// [`DirtyLog::take`](crate::ram::DirtyLog::take).
    DirtyLogTake,
    /// [`DirtyLog::put_back`](crate::ram::DirtyLog::put_back).
    DirtyLogPutBack,
    /// The closure with which a destination makes its blocks, as in `Arrival::load` of `qemu-stream`.
    MakeBlocks,
    /// None of these: a part of this library.
    Library,
}

impl Callback {
    /// Its name: `Guest::stop`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GuestDevices => "Guest::devices",
            Self::GuestCanThrottle => "Guest::can_throttle",
            Self::GuestThrottle => "Guest::throttle",
            Self::GuestRunState => "Guest::run_state",
            Self::GuestStop => "Guest::stop",
            Self::GuestSave => "Guest::save",
            Self::GuestResume => "Guest::resume",
            Self::DirtyLogBegin => "DirtyLog::begin",
            Self::DirtyLogTake => "DirtyLog::take",
            Self::DirtyLogPutBack => "DirtyLog::put_back",
            Self::MakeBlocks => "the closure of Arrival::load",
            Self::Library => "a part of this library",
        }
    }

    /// Who is at fault if it panics or does not return.
    pub(crate) fn fault(self) -> Fault {
        match self {
            Self::DirtyLogBegin | Self::DirtyLogTake | Self::DirtyLogPutBack => Fault::DirtyLog,
            Self::MakeBlocks | Self::Library => Fault::Caller,
            _ => Fault::Guest,
        }
    }
}

impl fmt::Display for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The state of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Not begun.
    #[default]
    None,
    /// Connections are established and blocks are announced.
    Setup,
    /// RAM is sent while the guest runs.
    Active,
    /// The guest has stopped, and the migration [waits](crate::live::Control::proceed) until it is continued.
    PreSwitchover,
    /// The guest has stopped: the last pages and the devices are sent.
    Device,
    /// The destination runs the guest, or is about to: the rest of RAM is sent, and requested pages first.
    PostcopyActive,
    /// The same, but a connection has broken: the migration waits until it is resumed.
    PostcopyPaused,
    /// The migration is being resumed over new connections.
    PostcopyRecover,
    /// The destination has everything.
    Completed,
    /// An error ended it; the guest can continue on the source.
    Failed,
    /// A cancel was requested.
    Cancelling,
    /// It was cancelled; the guest can continue on the source.
    Cancelled,
}

impl Status {
    pub(crate) const ALL: [Self; 12] = [
        Self::None,
        Self::Setup,
        Self::Active,
        Self::PreSwitchover,
        Self::Device,
        Self::PostcopyActive,
        Self::PostcopyPaused,
        Self::PostcopyRecover,
        Self::Completed,
        Self::Failed,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// QEMU's name of the state.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the migration is over.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Whether `next` may follow.
    pub fn may_become(self, next: Self) -> bool {
        use Status::{
            Active, Cancelled, Cancelling, Completed, Device, Failed, None, PostcopyActive, PostcopyPaused,
            PostcopyRecover, PreSwitchover, Setup,
        };
        match next {
            None => false,
            Setup => self == None,
            Active => self == Setup,
            PreSwitchover => self == Active,
            Device => matches!(self, Active | PreSwitchover),
            PostcopyActive => matches!(self, Device | PostcopyRecover),
            PostcopyPaused => matches!(self, PostcopyActive | PostcopyRecover),
            PostcopyRecover => self == PostcopyPaused,
            Completed => matches!(self, Device | PostcopyActive),
            // After the switch, only if the destination reports that it does not have the guest.
            Failed | Cancelling => !self.is_final() && self != Cancelling,
            Cancelled => self == Cancelling,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The cause of a migration's end, as far as this side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// It was cancelled on this side.
    Cancelled,
    /// The other side reported that it failed, or refused the migration. Its log has the reason.
    Peer,
    /// A connection could not be opened, broke or was closed.
    Connection,
    /// The other side is connected but did not do in time what it had to do.
    Stalled,
    /// The other side sent what the protocol does not allow, or what this version does not support.
    Protocol,
    /// The guest could not be stopped, saved, throttled or resumed.
    Guest,
    /// The dirty log could not be read.
    DirtyLog,
    /// The guest dirtied memory faster than it was sent, until the configured limit.
    NotConverged,
    /// Everything was sent, and it is not known whether the destination has the guest.
    OwnerUnknown,
    /// The caller: options, blocks or calls that do not fit, or a callback that failed.
    Caller,
    /// The operating system of this host: no memory, no thread, no space on the disk.
    System,
}

/// The share of time for which a guest's processors pause: 0 to 99 per cent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(u8);

impl Percent {
    /// The processors do not pause.
    pub const NONE: Self = Self(0);

    /// Creates a share of `percent` per cent. More than 99 becomes 99, because a guest that pauses all the time is
    /// stopped.
    pub fn new(percent: u8) -> Self {
        Self(percent.min(99))
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }

    /// How long processors must pause after they have run for `ran`. Short turns disturb a guest the least: QEMU's run
    /// for 10 ms each.
    pub fn pause_after(self, ran: Duration) -> Duration {
        ran.saturating_mul(u32::from(self.0)) / u32::from(100 - self.0)
    }

    /// The share of time for which they run, above 0 and up to 1.
    pub(crate) fn running(self) -> f64 {
        f64::from(100 - self.0) / 100.0
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// Why a migration does not converge at present: the guest dirties pages as fast as they are sent, or faster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stall {
    /// Bytes of RAM that the guest dirties per second; a page written twice between two bitmap syncs counts once.
    pub dirty_rate: u64,
    /// Bytes of RAM that are sent per second.
    pub sending_rate: u64,
    /// The present throttle of the guest.
    pub throttled: Percent,
    /// What would help, each by itself. The first has the least effect on the guest.
    pub remedies: Vec<Remedy>,
}

/// A change that would let a migration converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// A higher `max-bandwidth`: the present limit, in bytes per second, is used up.
    MaxBandwidth(u64),
    /// More `multifd-channels`; the value is their present number.
    Channels(u8),
    /// `auto-converge`, which is off.
    AutoConverge,
    /// A higher `max-cpu-throttle`.
    MaxCpuThrottle(Percent),
    /// A higher `downtime-limit`: with this value, the guest would have been stopped after one of the passes so far.
    DowntimeLimit(Duration),
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MaxBandwidth(now) => write!(f, "raise max-bandwidth (now {})", Rate(*now)),
            Self::Channels(now) => write!(f, "raise multifd-channels (now {now})"),
            Self::AutoConverge => f.write_str("switch auto-converge on"),
            Self::MaxCpuThrottle(now) => write!(f, "raise max-cpu-throttle (now {now})"),
            Self::DowntimeLimit(limit) => {
                write!(f, "allow {:.1} s of downtime (downtime-limit)", limit.as_secs_f64())
            }
        }
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dirty, sending) = (Rate(self.dirty_rate), Rate(self.sending_rate));
        write!(f, "will not converge: dirty {dirty}, sending {sending}")?;
        if self.throttled > Percent::NONE {
            write!(f, ", guest throttled by {}", self.throttled)?;
        }
        for (at, remedy) in self.remedies.iter().enumerate() {
            let between = match at {
                0 => "; ",
                _ if at + 1 < self.remedies.len() => ", ",
                1 => " or ",
                _ => ", or ",
            };
            write!(f, "{between}{remedy}")?;
        }
        Ok(())
    }
}

/// The limit of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// `max-passes`.
    Passes(u64),
    /// `max-total-time`.
    Time(Duration),
}

/// A migration that reached its [`Bound`] with the guest still running.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct NotConverged {
    /// What was reached.
    pub bound: Bound,
    /// Why it would have taken longer.
    pub stall: Option<Stall>,
    /// How much longer it would have taken, if that is known.
    pub expected_remaining_time: Option<Duration>,
}

impl fmt::Display for NotConverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameter = match self.bound {
            Bound::Passes(passes) => {
                write!(f, "not complete after {passes} passes")?;
                "max-passes"
            }
            Bound::Time(time) => {
                write!(f, "not complete after {:.1} s", time.as_secs_f64())?;
                "max-total-time"
            }
        };
        write!(f, " ({parameter}), so the guest continues at the source: ")?;
        match (&self.stall, self.expected_remaining_time) {
            (Some(stall), _) => stall.fmt(f),
            (None, Some(time)) => {
                write!(f, "about {:.1} s more were expected; raise {parameter}", time.as_secs_f64())
            }
            (None, None) => write!(f, "raise {parameter}"),
        }
    }
}

/// Bytes per second, as text for people.
struct Rate(u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            0..1_000_000 => (self.0 as f64 / 1e3, "kB/s"),
            1_000_000..1_000_000_000 => (self.0 as f64 / 1e6, "MB/s"),
            _ => (self.0 as f64 / 1e9, "GB/s"),
        };
        write!(f, "{value:.*} {unit}", usize::from(value < 10.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stall(remedies: &[Remedy]) -> Stall {
        Stall {
            dirty_rate: 900_000_000,
            sending_rate: 400_000_000,
            throttled: Percent::NONE,
            remedies: remedies.to_vec(),
        }
    }

    #[test]
    fn pause_of_a_processor_that_ran_for_any_time_is_a_time() {
        assert_eq!(Percent::new(50).pause_after(Duration::from_millis(10)), Duration::from_millis(10));
        for percent in [0, 1, 50, 99, 255] {
            let pause = Percent::new(percent).pause_after(Duration::MAX);
            assert_eq!(pause.is_zero(), percent == 0);
        }
    }

    #[test]
    fn stall_says_what_is_wrong_and_what_would_help() {
        let allow = Remedy::DowntimeLimit(Duration::from_millis(2100));
        let told = stall(&[Remedy::Channels(4), Remedy::AutoConverge, allow]).to_string();
        let expected = "will not converge: dirty 900 MB/s, sending 400 MB/s; raise multifd-channels (now 4), switch \
                        auto-converge on, or allow 2.1 s of downtime (downtime-limit)";
        assert_eq!(told, expected);
        let throttled = Stall { throttled: Percent::new(30), dirty_rate: 1_240_000_000, ..stall(&[]) };
        let expected = "will not converge: dirty 1.2 GB/s, sending 400 MB/s, guest throttled by 30 %";
        assert_eq!(throttled.to_string(), expected);
        let two = stall(&[Remedy::MaxBandwidth(52_428_800), Remedy::MaxCpuThrottle(Percent::new(30))]);
        assert!(
            two.to_string()
                .ends_with("; raise max-bandwidth (now 52 MB/s) or raise max-cpu-throttle (now 30 %)"),
            "{two}"
        );
    }

    #[test]
    fn bound_that_was_reached_says_what_to_do() {
        let passes =
            NotConverged { bound: Bound::Passes(30), stall: Some(stall(&[])), expected_remaining_time: None };
        assert_eq!(
            passes.to_string(),
            "not complete after 30 passes (max-passes), so the guest continues at the source: will not converge: dirty \
             900 MB/s, sending 400 MB/s"
        );
        let time = NotConverged {
            bound: Bound::Time(Duration::from_secs(60)),
            stall: None,
            expected_remaining_time: Some(Duration::from_millis(12_340)),
        };
        assert_eq!(
            time.to_string(),
            "not complete after 60.0 s (max-total-time), so the guest continues at the source: about 12.3 s more were \
             expected; raise max-total-time"
        );
        let unknown = NotConverged { expected_remaining_time: None, ..time };
        assert!(unknown.to_string().ends_with("source: raise max-total-time"), "{unknown}");
    }
}
