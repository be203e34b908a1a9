//! The connections of a migration.

use super::entry::{Entry, Newcomer, Origin, Unidentified};
use crate::{
    error::{Error, Violation},
    options::ChannelCount,
    wire::{ChannelId, VmUuid, limits},
};

/// The connections of the migration.
#[derive(Default)]
pub(super) struct Roster {
    /// The channels that belong to the migration, by id.
    pub(super) channels: Vec<Option<Entry>>,
    /// Channels that connected before main, and wait to be admitted.
    pub(super) waiting: Vec<Newcomer>,
    /// Main has connected, or the caller has reported what it contains: channels are admitted.
    pub(super) opened: bool,
    /// The origin of main, after it has connected.
    pub(super) main: Option<Origin>,
    /// The UUID of this side, or of the first channel.
    pub(super) uuid: Option<VmUuid>,
    /// The number of connections accepted so far.
    pub(super) accepted: u64,
    /// Connections whose threads have not ended: unidentified ones and channels.
    pub(super) open: usize,
    /// Connections that were closed to make room for others.
    pub(super) surplus: u64,
    /// Connections that are not identified yet.
    pub(super) unidentified: Vec<Unidentified>,
    /// The number of connections that were refused before main connected.
    pub(super) refused: u64,
    /// The number of connections that were dropped because they came from another host than main.
    pub(super) foreign: u64,
    /// Connections that were dropped before the first sync point without being identified.
    pub(super) lost: Vec<Origin>,
    /// There is only one connection: if it fails, the migration fails.
    pub(super) single: bool,
}

impl Roster {
    /// The place of channel `id`, which may be empty.
    pub(super) fn slot(&mut self, id: ChannelId) -> &mut Option<Entry> {
        let slot = usize::from(id.0);
        if self.channels.len() <= slot {
            self.channels.resize_with(slot + 1, || None);
        }
        self.channels.get_mut(slot).expect("there are enough now")
    }

    /// The number of channels that are connected.
    pub(super) fn count(&self) -> u16 {
        let count = self.channels.iter().flatten().filter(|place| !place.is_void()).count();
        u16::try_from(count).unwrap_or(u16::MAX)
    }

    /// The error if packets have numbers up to `greatest` and not all have arrived. Requires a source whose packet numbers
    /// have no gaps, and that all channels have received their SYNC for `point`.
    pub(super) fn missing_packets(&self, point: u64) -> Option<Error> {
        let places = || self.channels.iter().flatten();
        // What a lost channel has not delivered is not known.
        if places().any(|place| place.lost.is_some()) {
            return None;
        }
        let greatest = places().filter_map(|place| place.greatest).max()?;
        // Additional SYNCs at the end arrive after the last point.
        let found = places().map(|place| place.packets).sum::<u64>();
        (greatest >= found).then(|| Violation::MissingPackets { point, greatest, found }.into())
    }

    /// The number of channels that have connected, also before main.
    pub(super) fn connected(&self) -> u16 {
        self.count().saturating_add(u16::try_from(self.waiting.len()).unwrap_or(u16::MAX))
    }

    /// The first channel of this migration that is missing, as far as this is known.
    pub(super) fn missing(&self, expected: ChannelCount, has_channels: bool) -> Option<ChannelId> {
        let end = match expected {
            ChannelCount::Exact(count) => usize::from(count),
            ChannelCount::Auto => {
                let last = self.channels.iter().rposition(Option::is_some);
                last.map_or(usize::from(has_channels), |last| last + 1)
            }
        };
        let gap = (0..end).find(|id| self.channels.get(*id).is_none_or(Option::is_none))?;
        u8::try_from(gap).ok().map(ChannelId)
    }

    /// The entry of channel `id`, if its connection is `number`.
    pub(super) fn place(&mut self, id: ChannelId, number: u64) -> Option<&mut Entry> {
        let place = self.channels.get_mut(usize::from(id.0))?.as_mut()?;
        Some(place).filter(|place| place.origin.number == number)
    }

    /// Whether the migration continues without this channel.
    pub(super) fn is_lost(&self, id: ChannelId) -> bool {
        let place = self.channels.get(usize::from(id.0)).and_then(Option::as_ref);
        place.is_some_and(|place| place.lost.is_some())
    }

    /// A connection was dropped that may have been a channel.
    pub(super) fn lose(&mut self, origin: Origin) {
        if self.lost.len() == limits::GREETINGS {
            self.lost.remove(0);
        }
        self.lost.push(origin);
    }

    pub(super) fn is_waiting(&self, number: u64) -> bool {
        self.waiting.iter().any(|newcomer| newcomer.origin.number == number)
    }
}
