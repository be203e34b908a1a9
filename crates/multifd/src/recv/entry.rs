//! What is known of one connection, and of one channel.

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
    /// Counted from 1 in the order in which connections were accepted. A source opens main before it opens channels.
    pub(super) number: u64,
}

impl Origin {
    pub(super) fn new(link: &dyn Link, number: u64) -> Self {
        Self { peer: link.peer(), host: link.host(), number }
    }
}

/// A connection that has not said yet what it is.
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
    /// It has said what it is, and is about to be taken in or dropped.
    Identified,
    /// It was closed to make room; its thread is about to end.
    Closed,
}

/// A connection that begins as a channel does.
pub(super) struct Newcomer {
    pub(super) origin: Origin,
    pub(super) initial: Initial,
    pub(super) wake: Arc<dyn Wake>,
}

/// What main knows of a channel.
pub(super) struct Entry {
    pub(super) origin: Origin,
    /// Shuts its connection down; `None` when all is over.
    pub(super) wake: Option<Arc<dyn Wake>>,
    /// SYNC packets found.
    pub(super) reached: u64,
    /// Packets up to the SYNC met last, and the greatest of their numbers.
    pub(super) packets: u64,
    pub(super) greatest: Option<u64>,
    /// Its connection has ended, or its thread has.
    pub(super) ended: bool,
    /// It has ended without a single packet.
    pub(super) void: bool,
}

impl Entry {
    pub(super) fn new(origin: Origin, wake: Arc<dyn Wake>) -> Self {
        Self { origin, wake: Some(wake), reached: 0, packets: 0, greatest: None, ended: false, void: false }
    }

    /// Whether nothing came and nothing will.
    pub(super) fn is_void(&self) -> bool {
        self.ended && self.void
    }
}
