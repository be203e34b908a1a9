//! The plan of a life, step by step: its seed determines everything.

use fastrand::Rng;
use multifd::{Method, live::ZeroPageDetection, ram::PageSize};

use crate::{
    machine::Load,
    trouble::{Call, Moment, Trouble},
};

/// A whole life.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) page_size: PageSize,
    /// The number of pages of each block at the beginning.
    pub(crate) blocks: Vec<u64>,
    pub(crate) load: Load,
    pub(crate) runs: bool,
    pub(crate) steps: Vec<Step>,
}

/// One step, and the seed of its random decisions.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) seed: u64,
    pub(crate) what: Do,
}

#[derive(Clone, Debug)]
pub(crate) enum Do {
    /// Nothing happens for this number of microseconds.
    Wait(u64),
    /// This number of pages is written from outside the guest.
    Write(u64),
    Hop(Box<Hop>),
    Capture(Box<Capture>),
    Restore(Restore),
    /// A block with this number of pages is plugged in.
    Plug(u64),
    Unplug,
    /// The operator pauses the guest, or resumes it.
    Pause(bool),
}

/// A migration to another host.
#[derive(Clone, Debug)]
pub(crate) struct Hop {
    pub(crate) transport: Transport,
    pub(crate) tls: bool,
    /// 0 is multifd off.
    pub(crate) channels: u8,
    pub(crate) method: Method,
    pub(crate) told: bool,
    pub(crate) machine: &'static str,
    pub(crate) detection: ZeroPageDetection,
    pub(crate) auto_converge: bool,
    pub(crate) pauses: bool,
    /// Bytes a second.
    pub(crate) max_bandwidth: Option<u64>,
    /// In microseconds; `None` if it must not have an effect.
    pub(crate) max_total_time: Option<u64>,
    pub(crate) switchover_timeout: Option<u64>,
    /// Whether the destination waits until the source's channels have ended.
    pub(crate) takes_leave: bool,
    pub(crate) memory: Place,
    /// Milliseconds for which the destination waits before its reply.
    pub(crate) hold: u64,
    /// Whether it waits until the source has ended, and then replies at once.
    pub(crate) until_left: bool,
    /// How long the source waits for the reply, in milliseconds.
    pub(crate) end_timeout: u64,
    pub(crate) verdict_timeout: u64,
    /// Only if its destination cannot have the guest.
    pub(crate) resumes_if_unknown: bool,
    pub(crate) trouble: Trouble,
    /// Whether both sides continue without a channel that breaks.
    pub(crate) may_break: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
    Memory,
}

/// The memory of a machine on its next host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    New,
    /// Memory that any machine or failed attempt of this life has left.
    Used,
    /// The same blocks as on a former host, if it has the same.
    Former,
}

#[derive(Clone, Debug)]
pub(crate) struct Capture {
    /// 0 is over main.
    pub(crate) channels: u8,
    pub(crate) detection: ZeroPageDetection,
    pub(crate) machine: &'static str,
    pub(crate) offset: u64,
    pub(crate) direct: bool,
    pub(crate) pauses: bool,
    /// There is no trouble of a destination.
    pub(crate) trouble: Trouble,
}

#[derive(Clone, Debug)]
pub(crate) struct Restore {
    pub(crate) channels: u8,
    pub(crate) direct: bool,
    /// Into the machine that has continued, if it has the same blocks.
    pub(crate) in_place: bool,
    pub(crate) memory: Place,
    /// A first attempt is cancelled after this number of microseconds.
    pub(crate) cancelled: Option<u64>,
    /// How the machine is captured first, if it never was.
    pub(crate) capture: Box<Capture>,
}

impl Plan {
    pub(crate) fn new(seed: u64, steps: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let page_size =
            pick(&mut random, &[PageSize::KIB_4, PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64]);
        let most = 512 * 4096 / page_size.bytes() as u64;
        let blocks = (0..random.u64(1..5)).map(|_| pages(&mut random, most)).collect();
        let load = Load {
            writers: random.u64(..3),
            budget: 1 << random.u64(5..14),
            pagemap: random.u8(..3) == 0,
            seed: random.u64(..),
        };
        let runs = random.u8(..5) > 0;
        let steps = (0..steps).map(|_| step(&mut random, most)).collect();
        Self { seed, page_size, blocks, load, runs, steps }
    }
}

fn pages(random: &mut Rng, most: u64) -> u64 {
    let most = 1 << random.u32(5..=most.ilog2().max(5));
    random.u64(16..=most)
}

fn step(random: &mut Rng, most: u64) -> Step {
    let what = match random.u8(..32) {
        0 | 1 => Do::Wait(random.u64(..5000)),
        2..6 => Do::Write(1 << random.u64(..8)),
        6..21 => Do::Hop(Box::new(hop(random))),
        21..25 => Do::Capture(Box::new(capture(random))),
        25..28 => Do::Restore(restore(random)),
        28 => Do::Plug(pages(random, most)),
        29 => Do::Unplug,
        _ => Do::Pause(random.bool()),
    };
    Step { seed: random.u64(..), what }
}

fn hop(random: &mut Rng) -> Hop {
    let channels = match random.u8(..6) {
        0 | 1 => 0,
        2 => random.u8(5..=16),
        _ => random.u8(1..5),
    };
    let trouble = if random.u8(..8) < 3 { Trouble::default() } else { Trouble::any(random, true) };
    let pauses = random.u8(..8) == 0 || matches!(trouble.action, Some((_, Moment::PreSwitchover)));
    let auto_converge =
        random.u8(..8) == 0 || trouble.fault.is_some_and(|fault| fault.call == Call::Throttle);
    let impatient = random.u8(..10) == 0;
    let hold = match random.u8(..4) {
        _ if impatient => random.u64(..40),
        0 => random.u64(..30),
        _ => 0,
    };
    Hop {
        transport: pick(random, &[Transport::Tcp, Transport::Unix, Transport::Memory]),
        tls: random.u8(..6) == 0,
        channels,
        method: if channels == 0 { Method::None } else { pick(random, &METHODS) },
        told: random.bool(),
        machine: pick(random, &MACHINES),
        detection: detection(random),
        auto_converge,
        pauses,
        max_bandwidth: (random.u8(..8) == 0).then(|| random.u64(20 << 20..400 << 20)),
        resumes_if_unknown: trouble.must_fail() && random.u8(..4) == 0,
        max_total_time: (random.u8(..24) == 0).then(|| random.u64(1..20_000)),
        switchover_timeout: (random.u8(..12) == 0).then(|| random.u64(1..3000)),
        takes_leave: random.u8(..4) > 0,
        memory: pick(random, &[Place::New, Place::Used, Place::Former]),
        hold,
        until_left: impatient && random.bool(),
        end_timeout: if impatient { random.u64(1..10) } else { PATIENT },
        verdict_timeout: if random.u8(..4) == 0 { random.u64(1..20) } else { 10_000 },
        trouble,
        may_break: random.bool(),
    }
}

impl Hop {
    /// The same step again, without trouble and with another number of channels.
    pub(crate) fn without_trouble(&self) -> Self {
        let channels = if self.channels > 3 { 0 } else { self.channels + 2 };
        let method = if channels == 0 { Method::None } else { self.method };
        let (trouble, memory) = (Trouble::default(), Place::Used);
        let (end_timeout, until_left, resumes_if_unknown) = (PATIENT, false, false);
        let (max_total_time, switchover_timeout) = (None, None);
        Self {
            channels,
            method,
            trouble,
            end_timeout,
            until_left,
            resumes_if_unknown,
            memory,
            max_total_time,
            switchover_timeout,
            ..self.clone()
        }
    }

    /// A short name for the statistics.
    pub(crate) fn kind(&self) -> String {
        match (self.trouble.is_none(), self.max_total_time, self.switchover_timeout) {
            (true, Some(_), _) => "max-total-time".into(),
            (true, _, Some(_)) => "switchover-timeout".into(),
            (true, ..) if self.end_timeout < PATIENT => "impatient".into(),
            _ => self.trouble.kind(),
        }
    }

    /// Whether it may not fail.
    pub(crate) fn must_arrive(&self) -> bool {
        let strikes = self.max_total_time.or(self.switchover_timeout).is_some();
        self.trouble.is_none() && self.end_timeout == PATIENT && !strikes
    }
}

fn capture(random: &mut Rng) -> Capture {
    let trouble = if random.u8(..8) < 5 { Trouble::default() } else { Trouble::any(random, false) };
    let pauses = matches!(trouble.action, Some((_, Moment::PreSwitchover)));
    // A capture does not throttle, so this fault would never happen.
    let throttles = trouble.fault.is_some_and(|fault| fault.call == Call::Throttle);
    let trouble = if throttles { Trouble { fault: None, ..trouble } } else { trouble };
    Capture {
        channels: if random.u8(..3) == 0 { 0 } else { random.u8(1..9) },
        detection: detection(random),
        machine: pick(random, &MACHINES),
        offset: pick(random, &[0, 0, 4096, 12_345]),
        direct: random.u8(..4) == 0,
        pauses,
        trouble,
    }
}

fn restore(random: &mut Rng) -> Restore {
    Restore {
        channels: random.u8(1..9),
        direct: random.u8(..4) == 0,
        in_place: random.bool(),
        memory: pick(random, &[Place::New, Place::Used, Place::Former]),
        cancelled: (random.u8(..4) == 0).then(|| random.u64(..500)),
        capture: Box::new(Capture { trouble: Trouble::default(), pauses: false, ..capture(random) }),
    }
}

fn detection(random: &mut Rng) -> ZeroPageDetection {
    pick(random, &[ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd])
}

pub(crate) fn pick<T: Copy>(random: &mut Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

/// Milliseconds that no destination needs.
pub(crate) const PATIENT: u64 = 30_000;
const MACHINES: [&str; 6] =
    ["pc-q35-2.6", "pc-q35-5.2", "pc-q35-7.2", "pc-i440fx-8.1", "pc-q35-10.0", "my-vmm-1"];
const METHODS: [Method; 4] = [Method::None, Method::None, Method::Zlib, Method::Zstd];
