//! The state of one connection and of one channel.

use std::sync::Arc;

use crate::{
    channel::{Host, Link, Wake},
    wire::Initial,
};

/// Where a connection comes from.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) peer: String,
    pub(super) host: Option<Host>,
    /// The number of the connection, counted from 1 in the order of acceptance. A source opens main before its channels.
    pub(super) number: u64,
}

impl Origin {
    pub(super) fn new(link: &dyn Link, number: u64) -> Self {
        Self { peer: link.peer(), host: link.host(), number }
    }
}

/// A connection that is not identified yet.
pub(super) struct Unidentified {
    pub(super) origin: Origin,
    /// Shuts it down.
    pub(super) wake: Arc<dyn Wake>,
    pub(super) stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It can be closed to make room for another one.
    Silent,
    /// It is identified, and is about to be accepted or dropped.
    Identified,
    /// It was closed to make room; its thread is about to end.
    Closed,
}

/// A connection that has sent the initial packet of a channel.
pub(super) struct Newcomer {
    pub(super) origin: Origin,
    pub(super) initial: Initial,
    pub(super) wake: Arc<dyn Wake>,
}

/// The state of a channel.
pub(super) struct Entry {
    pub(super) origin: Origin,
    /// Shuts the connection down; `None` when the migration is over.
    pub(super) wake: Option<Arc<dyn Wake>>,
    /// The number of SYNC packets received.
    pub(super) reached: u64,
    /// The number of packets up to the last SYNC, and the greatest packet number among them.
    pub(super) packets: u64,
    pub(super) greatest: Option<u64>,
    /// The connection or its thread has ended.
    pub(super) ended: bool,
    /// It has ended without a packet.
    pub(super) void: bool,
    /// The connection is broken, and the migration continues without it.
    pub(super) lost: Option<Loss>,
}

/// Who knows of a lost channel.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Loss {
    /// The source has named it.
    pub(super) named: bool,
    /// A reply has named it.
    pub(super) reported: bool,
}

impl Entry {
    pub(super) fn new(origin: Origin, wake: Arc<dyn Wake>) -> Self {
        let (reached, packets, greatest) = (0, 0, None);
        let (ended, void, lost) = (false, false, None);
        Self { origin, wake: Some(wake), reached, packets, greatest, ended, void, lost }
    }

    /// Whether main waits for its SYNC at this point.
    pub(super) fn is_awaited(&self, point: u64) -> bool {
        self.lost.is_none() && !self.ended && self.reached < point
    }

    /// Whether no packet arrived before the connection ended.
    pub(super) fn is_void(&self) -> bool {
        self.ended && self.void
    }
}
