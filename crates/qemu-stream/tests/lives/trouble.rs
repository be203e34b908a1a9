//! The trouble of a migration or a capture, from the seed of its step.

use fastrand::Rng;

use crate::plan::pick;

/// All trouble of one migration or capture.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trouble {
    pub(crate) action: Option<(Action, Moment)>,
    /// In a call of the source.
    pub(crate) fault: Option<Fault>,
    pub(crate) devices: Devices,
    pub(crate) log: Log,
    pub(crate) destination: Option<Refusal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    CancelSource,
    CancelDestination,
    /// The destination's connections close without a message.
    Close,
}

/// When something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    BeforeConnecting,
    /// This number of microseconds after the beginning.
    After(u64),
    /// The destination makes its blocks.
    Make,
    /// The dirty bits are taken for this time, from 0.
    Take(u32),
    Stop,
    PreSwitchover,
    Save,
    /// The destination has everything.
    Pending,
    /// This number of microseconds after it begins to take the guest over.
    Confirm(u64),
    Confirmed,
}

/// A call that fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) call: Call,
    /// The index of the call, from 0.
    pub(crate) nth: u32,
    pub(crate) how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Call {
    Devices,
    RunState,
    Stop,
    Save,
    Resume,
    Throttle,
    Begin,
    Take,
    PutBack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Error,
    Panic,
    /// It panics after it has done its work.
    PanicAfter,
}

/// The source's description of its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Devices {
    #[default]
    Right,
    Twice,
    TooLarge,
    NotAnnounced,
    NotGiven,
    LongerThanAnnounced,
}

/// The source's dirty log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Log {
    #[default]
    Right,
    OfOtherBlocks,
    /// A second reader tries to read it at the same time.
    ReadByTwo,
    /// A device writes when this many takes have been made with the guest stopped.
    WrittenLate(u32),
}

/// Why the destination refuses the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    WrongMachine,
    MissingBlock,
    ShortBlock,
    SurplusBlock,
    MakeFails,
    MakePanics,
    Refuses,
    Drops,
    PanicsWithAll,
}

impl Trouble {
    /// Mostly one kind of trouble, sometimes two. A capture has no destination.
    pub(crate) fn any(random: &mut Rng, destination: bool) -> Self {
        let mut trouble = Self::default();
        for _ in 0..random.u8(1..10) / 8 + 1 {
            match random.u8(..16) {
                0..7 => trouble.action = Some(action(random, destination)),
                7..11 => trouble.fault = Some(fault(random)),
                11 => {
                    let wrong = [
                        Devices::Twice,
                        Devices::TooLarge,
                        Devices::NotAnnounced,
                        Devices::NotGiven,
                        Devices::LongerThanAnnounced,
                    ];
                    trouble.devices = pick(random, &wrong);
                }
                12 | 13 => {
                    let late = Log::WrittenLate(random.u32(..10));
                    trouble.log = pick(random, &[Log::OfOtherBlocks, Log::ReadByTwo, late]);
                }
                _ => trouble.destination = destination.then(|| pick(random, &REFUSALS)),
            }
        }
        // These calls are made only after a failure.
        if destination
            && trouble.fault.is_some_and(|fault| matches!(fault.call, Call::Resume | Call::PutBack))
        {
            trouble.destination = Some(pick(random, &[Refusal::Refuses, Refusal::Drops]));
        }
        trouble
    }

    pub(crate) fn is_none(&self) -> bool {
        self.action.is_none()
            && self.fault.is_none()
            && self.destination.is_none()
            && self.devices == Devices::Right
            && matches!(self.log, Log::Right | Log::ReadByTwo)
    }

    /// Whether the only trouble is a call that fails.
    pub(crate) fn is_fault_alone(&self) -> bool {
        self.fault.is_some() && Self { fault: None, ..self.clone() }.is_none()
    }

    /// Whether it must not succeed.
    pub(crate) fn must_fail(&self) -> bool {
        let action = match self.action {
            Some((Action::CancelSource, at)) => !matches!(
                at,
                Moment::After(_)
                    | Moment::Confirm(_)
                    | Moment::Confirmed
                    | Moment::Take(1..)
                    | Moment::Pending
            ),
            Some((Action::CancelDestination, at)) => {
                !matches!(at, Moment::After(_) | Moment::Confirm(_) | Moment::Confirmed | Moment::Take(1..))
            }
            // Before, it may have no connection yet.
            Some((Action::Close, at)) => matches!(at, Moment::Make | Moment::Pending),
            None => false,
        };
        let fault = self.fault.is_some_and(|fault| match fault.call {
            Call::Resume | Call::PutBack => false,
            Call::Take => fault.nth < 2,
            _ => true,
        });
        action
            || fault
            || self.destination.is_some()
            || self.devices != Devices::Right
            || self.log == Log::OfOtherBlocks
    }

    /// Whether the source may report that it was cancelled.
    pub(crate) fn cancels_source(&self) -> bool {
        matches!(self.action, Some((Action::CancelSource, _)))
    }

    /// A short name for the statistics.
    pub(crate) fn kind(&self) -> String {
        if let Some((action, at)) = self.action {
            let at = format!("{at:?}");
            return format!("{action:?} {}", at.split('(').next().unwrap_or_default());
        }
        if let Some(fault) = self.fault {
            return format!("{:?} {:?}", fault.how, fault.call);
        }
        if let Some(refusal) = self.destination {
            return format!("{refusal:?}");
        }
        if self.devices != Devices::Right {
            return format!("Devices {:?}", self.devices);
        }
        match self.log {
            Log::Right => "none".into(),
            log => format!("Log {log:?}").split('(').next().unwrap_or_default().into(),
        }
    }
}

fn action(random: &mut Rng, destination: bool) -> (Action, Moment) {
    let short = 1 << random.u64(4..16);
    let moments = [
        Moment::BeforeConnecting,
        Moment::After(random.u64(..short)),
        Moment::After(random.u64(..short)),
        Moment::Take(random.u32(..8)),
        Moment::Stop,
        Moment::PreSwitchover,
        Moment::Save,
    ];
    if !destination {
        return (Action::CancelSource, pick(random, &moments));
    }
    let action = match random.u8(..6) {
        0..3 => Action::CancelSource,
        3 | 4 => Action::CancelDestination,
        _ => Action::Close,
    };
    let late = random.u64(..400);
    let at_the_end =
        [Moment::Make, Moment::Pending, Moment::Confirm(late), Moment::Confirm(0), Moment::Confirmed];
    let moment = if random.bool() { pick(random, &moments) } else { pick(random, &at_the_end) };
    // There is nothing to be closed.
    let moment = match (action, moment) {
        (Action::Close, Moment::BeforeConnecting) => Moment::Make,
        _ => moment,
    };
    (action, moment)
}

fn fault(random: &mut Rng) -> Fault {
    let call = pick(
        random,
        &[
            Call::Devices,
            Call::Stop,
            Call::Stop,
            Call::Save,
            Call::Resume,
            Call::Throttle,
            Call::Begin,
            Call::Take,
            Call::Take,
            Call::PutBack,
            Call::RunState,
        ],
    );
    let how = match call {
        Call::Devices | Call::RunState | Call::Resume | Call::PutBack => How::Panic,
        _ => pick(random, &[How::Error, How::Panic, How::PanicAfter]),
    };
    let nth = match call {
        Call::Take => random.u32(..8),
        _ => 0,
    };
    Fault { call, nth, how }
}

const REFUSALS: [Refusal; 9] = [
    Refusal::WrongMachine,
    Refusal::MissingBlock,
    Refusal::ShortBlock,
    Refusal::SurplusBlock,
    Refusal::MakeFails,
    Refusal::MakePanics,
    Refusal::Refuses,
    Refusal::Drops,
    Refusal::PanicsWithAll,
];
