//! Decides which connections belong to the migration: main, and the channels that come from its host.
//!
//! A channel that connects before main does not belong to a migration yet: it may be left over from a source that has
//! ended, or it may come from an unrelated program. It waits (`Roster::waiting`), and its id stays free. When main
//! connects, or when the caller reports what main contains, the waiting channels are admitted, and those from another host
//! are dropped. Before a channel is admitted, only its initial packet and the fixed part of its first head are read.

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

/// The result for the channels that waited for main.
#[must_use]
#[derive(Default)]
pub(super) struct Opened {
    /// Connections to shut down after the lock is released.
    strangers: Vec<Arc<dyn Wake>>,
    error: Option<Error>,
}

impl Shared {
    /// Whether a connection from `origin` may be a channel of this migration.
    pub(super) fn may_belong(&self, state: &State, origin: &Origin) -> bool {
        let main = state.roster.main.as_ref().and_then(|main| main.host);
        self.options.channels_from.admits(origin.host, main)
    }

    /// Whether an unidentified connection may be a channel of this migration. Main connects first, so an earlier connection
    /// is not.
    pub(super) fn may_be_missed(&self, state: &State, origin: &Origin) -> bool {
        let behind_main = state.roster.main.as_ref().is_some_and(|main| origin.number > main.number);
        behind_main && self.may_belong(state, origin)
    }

    /// Whether a connection that does not say what it is may be the one of postcopy-preempt.
    pub(super) fn may_preempt(&self, origin: &Origin) -> bool {
        let state = self.lock();
        state.source.preempt.may_come && self.may_be_missed(&state, origin)
    }

    /// Main has connected, or the caller has reported what it contains: channels are admitted from now on.
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

    /// Completes [`open`](Self::open) after the lock is released.
    pub(super) fn finish_opening(&self, opened: Opened) -> Result<()> {
        for stranger in opened.strangers {
            stranger.wake();
        }
        opened.error.map_or(Ok(()), |error| Err(self.stop.fail(error)))
    }

    /// Main has connected from `origin`. A channel from another host that was admitted before is an error, because it may
    /// have written pages.
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

    /// Registers a channel, or fails the migration if it is invalid. Returns `false` if the channel is dropped.
    pub(super) fn register(&self, newcomer: Newcomer) -> bool {
        let mut state = self.lock();
        let beyond = self.is_beyond(&state, &newcomer);
        let joined = if state.roster.single || state.roster.opened && !beyond {
            self.admit(&mut state, newcomer)
        } else {
            // `enlist` limits their number. Several waiting channels may have the same id until main connects and shows
            // which ones belong to it.
            state.roster.waiting.push(newcomer);
            Ok(true)
        };
        drop(state);
        joined.unwrap_or_else(|error| {
            self.stop.fail(error);
            false
        })
    }

    /// Whether the channel's id is too great for the number of channels on this side, while the source may still announce
    /// its own number. If so, the channel waits, because an error that names both numbers is better than one that names an
    /// id.
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
                 | channel of this migration, set channels-from"
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
            // Pages of this channel may be older than pages that other channels have written since.
            return refused(Violation::LateChannel { id, point: state.gate.released }.into());
        }
        *state.roster.slot(id) = Some(Entry::new(origin, wake));
        self.context.stall_timer.moved();
        self.changed.notify_all();
        Ok(true)
    }

    /// Waits until channel `id` on connection `number` is admitted and the page size is known. `None` if this will not
    /// happen: the migration is over, or the connection does not belong to it.
    pub(super) fn wait_admitted(&self, id: ChannelId, number: u64) -> Option<PageSize> {
        let mut state = self.lock();
        loop {
            let admitted = state.roster.place(id, number).is_some();
            // Also after the migration is over: an admitted channel is read to its end.
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

    /// The connection of channel `id` has ended after this number of packets. Before the first sync point, the id of a
    /// channel without packets is free again if the channel is older than main, because it is left over from an earlier
    /// source. Otherwise the id stays taken: a source does not connect a second time.
    pub(super) fn ended(&self, id: ChannelId, number: u64, packets: u64) {
        let mut state = self.lock();
        let main = state.roster.main.as_ref().map(|main| main.number);
        state.roster.waiting.retain(|newcomer| newcomer.origin.number != number);
        if let Some(place) = state.roster.place(id, number) {
            place.ended = true;
            place.void = packets == 0;
            // Older than main: it is left over from an earlier source.
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

    /// Whether an error of channel `id` before its first packet only means that a connection of an earlier source has
    /// ended.
    pub(super) fn is_left_over(&self, id: ChannelId, number: u64, error: &Error) -> bool {
        let mut state = self.lock();
        let older = state.roster.main.as_ref().is_some_and(|main| number < main.number);
        let broken = matches!(error.kind(), Error::Io { .. } | Error::Violation(Violation::Cut { .. }));
        state.roster.place(id, number).is_none() || older && broken && state.gate.released == 0
    }

    /// Records that an unidentified connection is dropped. While the number of channels is unknown, it may have been a
    /// channel.
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
        // Main may announce the number of channels later: the first sync point checks it.
        state.roster.lose(origin);
    }

    /// The error for the first dropped connection that may have been a channel, while the number of channels is unknown.
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

/// Whether, after this error, a connection may have been lost without its source noticing it. The source notices a closed
/// connection and a failed handshake.
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
