//! Who belongs to the migration: main, and the channels that come from its host.
//!
//! A channel that comes before main belongs to no migration yet: its connection may be left over from a source that has
//! died, or come from a stranger. It waits (`Roster::waiting`), and its id stays free. When main comes, or when the caller
//! says what main has said, the channels that are here are admitted, and those from another host are dropped. Nothing
//! of a channel is read before it is admitted but its initial packet and the fixed part of its first head.

use std::{io, sync::Arc};

use super::{
    entry::{Entry, Newcomer, Origin},
    shared::{Shared, State},
};
use crate::{
    channel::Wake,
    error::{Error, Result, Usage, Violation},
    options::ChannelCount,
    ram::PageSize,
    wire::{ChannelId, Initial},
};

/// What came of the channels that waited for main.
#[must_use]
#[derive(Default)]
pub(super) struct Opened {
    /// Connections to shut down, without the lock.
    strangers: Vec<Arc<dyn Wake>>,
    error: Option<Error>,
}

impl Shared {
    /// Whether a connection from `origin` may be a channel of this migration.
    pub(super) fn may_belong(&self, state: &State, origin: &Origin) -> bool {
        let main = state.roster.main.as_ref().and_then(|main| main.host);
        self.options.channels_from.admits(origin.host, main)
    }

    /// The same, of one that has not said what it is: main comes first, so what came before it is none.
    pub(super) fn may_be_missed(&self, state: &State, origin: &Origin) -> bool {
        let behind_main = state.roster.main.as_ref().is_some_and(|main| origin.number > main.number);
        behind_main && self.may_belong(state, origin)
    }

    /// Main has come, or has said something: channels are admitted from now on.
    pub(super) fn open(&self, state: &mut State) -> Opened {
        state.roster.opened = true;
        let mut opened = Opened::default();
        for newcomer in std::mem::take(&mut state.roster.waiting) {
            if self.is_beyond(state, &newcomer) {
                state.roster.waiting.push(newcomer);
                continue;
            }
            let wake = newcomer.wake.clone();
            match self.admit(state, newcomer) {
                Ok(true) => {}
                Ok(false) => opened.strangers.push(wake),
                Err(error) => opened.error = opened.error.or(Some(error)),
            }
        }
        self.changed.notify_all();
        opened
    }

    /// Carries out what came of [`open`](Self::open).
    pub(super) fn finish_opening(&self, opened: Opened) -> Result<()> {
        for stranger in opened.strangers {
            stranger.wake();
        }
        opened.error.map_or(Ok(()), |error| Err(self.stop.fail(error)))
    }

    /// Main has come from here. A channel from elsewhere that was admitted before may have brought pages by now.
    pub(super) fn main_from(&self, state: &mut State, origin: Origin) -> Opened {
        state.roster.main = Some(origin);
        let places = (0..=u8::MAX).map(ChannelId).zip(&state.roster.channels);
        let mut foreign = places.filter_map(|(id, place)| Some((id, place.as_ref()?)));
        let foreign = foreign.find(|(_, place)| !self.may_belong(state, &place.origin));
        let error = foreign.map(|(id, place)| {
            Error::from(Violation::ForeignChannel { id })
                .at(format_args!("connection from {}", place.origin.peer))
        });
        let opened = self.open(state);
        Opened { error: error.or(opened.error), ..opened }
    }

    /// Takes a channel in, or fails the migration if it cannot; `false` if it is dropped.
    pub(super) fn register(&self, newcomer: Newcomer) -> bool {
        let mut state = self.lock();
        let beyond = self.is_beyond(&state, &newcomer);
        let joined = if state.roster.single || state.roster.opened && !beyond {
            self.admit(&mut state, newcomer)
        } else {
            // As many as `enlist` leaves open. They come from anywhere and at any time: an id may be there twice until main tells which is which.
            state.roster.waiting.push(newcomer);
            Ok(true)
        };
        drop(state);
        joined.unwrap_or_else(|error| {
            self.stop.fail(error);
            false
        })
    }

    /// Whether its id is not below the number of channels given here, while the source may still announce its own: an error
    /// that names both is better than one that names an id.
    fn is_beyond(&self, state: &State, newcomer: &Newcomer) -> bool {
        let undecided =
            state.source.announced.is_none() && state.gate.released == 0 && !state.gate.main_waits;
        undecided && newcomer.initial.id.0 >= self.options.channels.most()
    }

    fn admit(&self, state: &mut State, newcomer: Newcomer) -> Result<bool> {
        let Newcomer { origin, initial: Initial { uuid, id }, wake } = newcomer;
        let refused = |error: Error| Err(error.at(format_args!("connection from {}", origin.peer)));
        if !self.may_belong(state, &origin) {
            state.roster.foreign += 1;
            let (peer, main) = (&origin.peer, state.roster.main.as_ref().map(|main| &main.peer));
            tracing::warn!(
                peer,
                main,
                channel = id.0,
                "a connection that begins like a channel comes from another host than main and is dropped: if it is a \
                 channel of this migration, see channels-from"
            );
            return Ok(false);
        }
        if state.roster.single {
            return refused(Usage::SingleConnection(origin.peer.clone()).into());
        }
        let expected = *state.roster.uuid.get_or_insert(uuid);
        if uuid != expected {
            return refused(Violation::ForeignUuid { expected, found: uuid }.into());
        }
        let most = self.expected(state).most();
        if id.0 >= most {
            return refused(Violation::ChannelId { id, channels: most.into() }.into());
        }
        let begun = state.gate.released > 0;
        if state.roster.slot(id).as_ref().is_some_and(|place| begun || !place.is_void()) {
            return refused(Violation::DuplicateChannel { id }.into());
        }
        if state.gate.released > 1 || state.life.sealed {
            // Pages of this channel may be older than what other channels have brought since.
            return refused(Violation::LateChannel { id, point: state.gate.released }.into());
        }
        *state.roster.slot(id) = Some(Entry::new(origin, wake));
        self.context.stall_timer.moved();
        self.changed.notify_all();
        Ok(true)
    }

    /// Waits until channel `id`, whose connection is `number`, is admitted and main has told the page size. `None` if
    /// neither will be: the migration is over, or the connection is a stranger's.
    pub(super) fn wait_admitted(&self, id: ChannelId, number: u64) -> Option<PageSize> {
        let mut state = self.lock();
        loop {
            let admitted = state.roster.place(id, number).is_some();
            // Also when all is over: one that was admitted reads on to its end.
            if let (true, Some(page_size)) = (admitted, self.page_size.get()) {
                return Some(*page_size);
            }
            if state.life.stopped || state.life.sealed || !admitted && !state.roster.is_waiting(number) {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// Whether channel `id` is the one on connection `number`.
    pub(super) fn is_admitted(&self, id: ChannelId, number: u64) -> bool {
        self.lock().roster.place(id, number).is_some()
    }

    /// The connection of channel `id` has ended, after so many packets. Where nothing has come over it, its place is free
    /// for another one, until the first sync point. Nobody waits for that, unless it was left over from a source that has
    /// died: a source does not try again.
    pub(super) fn ended(&self, id: ChannelId, number: u64, packets: u64) {
        let mut state = self.lock();
        let main = state.roster.main.as_ref().map(|main| main.number);
        state.roster.waiting.retain(|newcomer| newcomer.origin.number != number);
        if let Some(place) = state.roster.place(id, number) {
            place.ended = true;
            place.void = packets == 0;
            // Older than main: of a source before this one.
            if place.is_void() && main.is_some_and(|main| number < main) && state.gate.released == 0 {
                *state.roster.slot(id) = None;
                if state.roster.count() == 0 {
                    state.roster.uuid = self.options.uuid;
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Whether an error of channel `id`, before its first packet, is the end of a connection that another source has left.
    pub(super) fn is_left_over(&self, id: ChannelId, number: u64, error: &Error) -> bool {
        let mut state = self.lock();
        let older = state.roster.main.as_ref().is_some_and(|main| number < main.number);
        let broken = matches!(error.kind(), Error::Io { .. } | Error::Violation(Violation::Cut { .. }));
        state.roster.place(id, number).is_none() || older && broken && state.gate.released == 0
    }

    /// A connection is dropped that has not said what it is. While it is not known how many channels there are, it may
    /// have been one.
    pub(super) fn note_lost(&self, origin: Origin) {
        let mut state = self.lock();
        if !matches!(self.expected(&state), ChannelCount::Auto) {
            return;
        }
        if state.gate.released > 0 {
            let lost = self.may_be_missed(&state, &origin).then(|| lost(&origin));
            drop(state);
            lost.map(|error| self.stop.fail(error));
            return;
        }
        // Main may be about to say how many there are: the first sync point asks.
        state.roster.lose(origin);
    }

    /// The first of the connections lost that is missed, where nothing tells how many channels there are.
    pub(super) fn missed(&self, state: &State) -> Option<Error> {
        if !matches!(self.expected(state), ChannelCount::Auto) {
            return None;
        }
        state.roster.lost.iter().find(|origin| self.may_be_missed(state, origin)).map(lost)
    }
}

fn lost(origin: &Origin) -> Error {
    Error::from(Violation::LostConnection).at(format_args!("connection from {}", origin.peer))
}

/// Whether an error says that a connection may have been lost without its source knowing. One that was closed is known to
/// the source to have failed, and so is a handshake.
pub(super) fn is_unnoticed(error: &Error) -> bool {
    match error.kind() {
        Error::TimedOut { .. } | Error::Malformed(_) | Error::Unsupported(_) => true,
        Error::Io { source, .. } => is_system(source),
        _ => false,
    }
}

fn is_system(error: &io::Error) -> bool {
    error.raw_os_error().is_some()
}
