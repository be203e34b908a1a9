//! The plan of one migration of the soak test: its seed determines everything.

use std::{ops::Range, time::Duration};

use fastrand::Rng;
use multifd::{Method, live::ZeroPageDetection, ram::PageSize};

/// One migration.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) transport: Transport,
    pub(crate) tls: bool,
    pub(crate) page_size: PageSize,
    /// Pages of each block.
    pub(crate) blocks: Vec<u64>,
    /// The number of zero pages out of 8.
    pub(crate) zero_eighths: u64,
    /// 0 is multifd off.
    pub(crate) channels: u8,
    pub(crate) method: Method,
    /// Whether the number of channels and the method are configured at the destination.
    pub(crate) told: bool,
    pub(crate) machine: &'static str,
    pub(crate) detection: ZeroPageDetection,
    pub(crate) return_path: bool,
    /// Whether the destination's blocks are in a file.
    pub(crate) in_file: bool,
    pub(crate) max_bandwidth: Option<u64>,
    pub(crate) downtime_limit: Duration,
    pub(crate) guest: Load,
    pub(crate) fault: Fault,
    /// Whether both sides continue without a channel that breaks.
    pub(crate) may_break: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
    Memory,
}

/// How the guest writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) writers: u64,
    /// Pages per second of each writer.
    pub(crate) rate: u64,
    /// The number of pages that each writes before it rests, so that every migration ends.
    pub(crate) budget: u64,
}

/// The fault of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// A cancel.
    Cancel(Side, Duration),
    /// Something befalls a connection.
    Link {
        side: Side,
        /// Its index in the order of this side: the source's first is main.
        connection: usize,
        direction: Direction,
        /// Bytes that pass before.
        after: u64,
        what: Mishap,
    },
    /// A connection that cannot be established.
    Refused(usize),
    /// Before a connection is opened, a foreign one is opened and sends these bytes.
    Stranger(usize, &'static [u8]),
    /// The guest cannot be stopped.
    GuestStaysUp,
    /// The dirty log cannot be read after this number of takes.
    LogUnreadable(u32),
    /// The destination refuses the machine.
    BlocksRefused,
    /// The destination has everything and reports that it has failed.
    LoadFails,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Sent,
    Received,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mishap {
    /// Both directions end.
    Cut,
    /// Nothing more can be sent.
    HalfClose,
    /// Sent bytes do not arrive, without a notification.
    Swallow,
    /// Nothing more is received, as by a program that hangs.
    Hold,
    /// One bit is another.
    Flip(u8),
    /// Bytes move slowly for a while.
    Slow,
}

impl Plan {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let page_size = match random.u8(..8) {
            0 => PageSize::KIB_16,
            1 => PageSize::KIB_64,
            _ => PageSize::KIB_4,
        };
        let channels = match random.u8(..16) {
            0 => 0,
            1 => 1,
            2 => random.u8(9..40),
            _ => random.u8(2..9),
        };
        let method = match (channels, random.u8(..8)) {
            (1.., 0) => Method::Zlib,
            (1.., 1) => Method::Zstd,
            _ => Method::None,
        };
        let transport = match random.u8(..8) {
            0 | 1 => Transport::Unix,
            2 | 3 => Transport::Memory,
            _ => Transport::Tcp,
        };
        let blocks = blocks(&mut random, page_size);
        let bytes = blocks.iter().sum::<u64>() * page_size.bytes() as u64;
        let fault = fault(&mut random, usize::from(channels), bytes);
        // Without a return path, the source cannot know the state of its destination.
        let return_path = !matches!(fault, Fault::None | Fault::GuestStaysUp | Fault::LogUnreadable(_))
            || random.u8(..4) > 0;
        Self {
            seed,
            transport,
            tls: random.u8(..4) == 0,
            page_size,
            blocks,
            zero_eighths: random.u64(..=8),
            channels,
            method,
            told: random.bool(),
            machine: ["pc-q35-5.2", "pc-q35-7.2", "pc-i440fx-8.1", "pc-q35-10.0", "virt-9.2"]
                [random.usize(..5)],
            detection: [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd]
                [random.usize(..3)],
            return_path,
            in_file: random.u8(..4) == 0,
            max_bandwidth: (random.u8(..8) == 0).then(|| random.u64(50 << 20..500 << 20)),
            downtime_limit: Duration::from_millis(random.u64(1..300)),
            guest: Load {
                writers: random.u64(..3),
                rate: power_of_two(&mut random, 6..15),
                budget: power_of_two(&mut random, 6..15),
            },
            fault,
            may_break: random.bool(),
        }
    }

    /// Whether the fault must not prevent the migration from completing.
    pub(crate) fn must_arrive(&self) -> bool {
        match self.fault {
            Fault::None | Fault::Link { what: Mishap::Slow, .. } => true,
            // An interrupted connection from the source's host may have been a channel, if their number is unknown. The
            // same applies to one that begins like a channel.
            Fault::Stranger(connection, says) => (connection == 0 || self.told) && !says.starts_with(MAGIC),
            _ => false,
        }
    }

    /// Whether the broken connection may be one for which a side only waits.
    pub(crate) fn waits(&self) -> bool {
        matches!(self.fault, Fault::Link { what: Mishap::Swallow | Mishap::Hold | Mishap::Flip(_), .. })
    }

    /// Whether a wrong byte may arrive unnoticed: the format has no checksum, TLS has.
    pub(crate) fn may_differ(&self) -> bool {
        !self.tls && matches!(self.fault, Fault::Link { what: Mishap::Flip(_), .. })
    }

    /// Whether that byte may be in the destination's last message, so that the source reads a failure as a success.
    pub(crate) fn may_hear_wrong(&self) -> bool {
        let back = |side, direction| (side == Side::Source) == (direction == Direction::Received);
        self.may_differ()
            && matches!(self.fault, Fault::Link { side, direction, .. } if back(side, direction))
    }

    /// Whether the destination's last message may not reach the source.
    pub(crate) fn owner_may_be_unknown(&self) -> bool {
        let back = |side, direction| (side == Side::Source) == (direction == Direction::Received);
        self.return_path
            && matches!(self.fault, Fault::Link { side, connection: 0, direction, what, .. }
                if back(side, direction) || what == Mishap::Cut)
    }

    /// Whether the migration must fail.
    pub(crate) fn must_fail(&self) -> bool {
        matches!(
            self.fault,
            Fault::Refused(_) | Fault::GuestStaysUp | Fault::BlocksRefused | Fault::LoadFails
        )
    }

    /// Whether a failure is allowed only after the fault has happened.
    pub(crate) fn needs_a_strike(&self) -> bool {
        matches!(self.fault, Fault::Link { .. } | Fault::Refused(_) | Fault::Stranger(..)) && !self.waits()
    }

    /// The text that the source's error must contain.
    pub(crate) fn source_tells(&self) -> Option<&'static str> {
        match self.fault {
            Fault::Refused(_) => Some("connection refused"),
            Fault::GuestStaysUp => Some(STAYS_UP),
            Fault::LogUnreadable(_) => Some(UNREADABLE),
            _ => None,
        }
    }

    /// The text that the destination's error must contain.
    pub(crate) fn destination_tells(&self) -> Option<&'static str> {
        match self.fault {
            Fault::BlocksRefused => Some(DOES_NOT_FIT),
            Fault::LoadFails => Some(ODD),
            _ => None,
        }
    }
}

impl Fault {
    /// A short name for the statistics.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Cancel(Side::Source, _) => "cancelled at the source",
            Self::Cancel(Side::Destination, _) => "cancelled at the destination",
            Self::Link { what, .. } => match what {
                Mishap::Cut => "connection cut",
                Mishap::HalfClose => "connection half closed",
                Mishap::Swallow => "bytes lost",
                Mishap::Hold => "reader stops",
                Mishap::Flip(_) => "bit flipped",
                Mishap::Slow => "slow connection",
            },
            Self::Refused(_) => "connection refused",
            Self::Stranger(..) => "unrelated connection",
            Self::GuestStaysUp => "guest cannot be stopped",
            Self::LogUnreadable(_) => "dirty log unreadable",
            Self::BlocksRefused => "machine refused",
            Self::LoadFails => "load fails",
        }
    }
}

/// `bytes` is the size of RAM.
fn fault(random: &mut Rng, channels: usize, bytes: u64) -> Fault {
    let side = if random.bool() { Side::Source } else { Side::Destination };
    let connection = random.usize(..=channels);
    match random.u8(..32) {
        0..8 => Fault::None,
        8..11 => Fault::Cancel(side, Duration::from_micros(power_of_two(random, 5..18))),
        11..24 => mishap(random, side, connection, channels, bytes),
        24 => Fault::Refused(connection),
        25..27 => Fault::Stranger(connection, STRANGE[random.usize(..STRANGE.len())]),
        27 => Fault::GuestStaysUp,
        28 => Fault::LogUnreadable(random.u32(..4)),
        29 => Fault::BlocksRefused,
        30 => Fault::LoadFails,
        _ => Fault::Cancel(side, Duration::from_micros(random.u64(..300_000))),
    }
}

/// The fault of a connection, mostly before it has carried all its bytes.
fn mishap(random: &mut Rng, side: Side, connection: usize, channels: usize, bytes: u64) -> Fault {
    let what = match random.u8(..13) {
        0..4 => Mishap::Cut,
        4 | 5 => Mishap::HalfClose,
        6 => Mishap::Swallow,
        7 => Mishap::Hold,
        8..11 => Mishap::Flip(random.u8(..8)),
        _ => Mishap::Slow,
    };
    let towards = if side == Side::Source { Direction::Sent } else { Direction::Received };
    let back = if side == Side::Source { Direction::Received } else { Direction::Sent };
    let direction = match what {
        Mishap::HalfClose | Mishap::Swallow => Direction::Sent,
        Mishap::Hold => Direction::Received,
        // Only main carries bytes back.
        _ if connection == 0 && random.u8(..4) == 0 => back,
        _ => towards,
    };
    let carries = match (direction == towards, connection, channels) {
        (false, ..) => 5,
        (true, _, 0) => bytes.ilog2(),
        (true, 0, _) => 11,
        (true, ..) => (bytes / channels as u64).ilog2().max(10),
    };
    Fault::Link { side, connection, direction, after: power_of_two(random, 0..carries), what }
}

fn blocks(random: &mut Rng, page_size: PageSize) -> Vec<u64> {
    let count = random.usize(1..5);
    let most = if random.u8(..16) == 0 { 26 } else { 24 };
    std::iter::repeat_with(|| (power_of_two(random, 12..most) / page_size.bytes() as u64).max(1))
        .take(count)
        .collect()
}

/// A number that is small as often as large.
fn power_of_two(random: &mut Rng, bits: Range<u32>) -> u64 {
    let least = 1 << random.u32(bits);
    random.u64(least..2 * least)
}

/// The text of the errors that are made here.
pub(crate) const STAYS_UP: &str = "a vCPU does not answer";
pub(crate) const UNREADABLE: &str = "the log cannot be read";
pub(crate) const DOES_NOT_FIT: &str = "it does not fit";
pub(crate) const ODD: &str = "they are odd";

const MAGIC: &[u8] = b"\x11\x22\x33\x44";
/// The bytes of foreign connections: nothing, another protocol, a part of an initial packet, an initial packet of
/// another version.
const STRANGE: [&[u8]; 4] =
    [b"", b"GET / HTTP/1.0\r\n\r\n", b"\x11\x22\x33\x44\0\0", b"\x11\x22\x33\x44\0\0\0\x02"];
