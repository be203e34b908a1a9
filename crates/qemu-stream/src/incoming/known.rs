//! What the stream of a source has shown so far.

use std::sync::Arc;

use super::{early::RunEarly, line::BeforeRefusal};
use crate::format::{BlockList, Configuration, SectionId, SyncMode};

/// The progress of post-copy.
#[derive(Debug, Default)]
pub(super) struct Postcopy {
    pub(super) served: bool,
    pub(super) advised: bool,
    pub(super) listening: bool,
    pub(super) run: bool,
    /// The source has returned, and asks for what has arrived.
    pub(super) resuming: bool,
    pub(super) before_refusal: BeforeRefusal,
    /// Runs the guest before its RAM is there.
    pub(super) early: Option<Arc<dyn RunEarly>>,
    /// The PINGs of the package whose PONGs are withheld.
    pub(super) withheld: Vec<u32>,
    /// The source has asked whether its pages were discarded. After the reply it switches.
    pub(super) asked: bool,
    /// The source is one of this library.
    pub(super) ours: bool,
}

/// What earlier events have shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) configuration: Option<Configuration>,
    pub(super) ram: Option<(SectionId, BlockList)>,
    pub(super) sync_mode: Option<SyncMode>,
    pub(super) switchover_start: bool,
    pub(super) footers: bool,
}

impl Known {
    pub(super) fn page_size(&self) -> usize {
        self.ram.as_ref().map_or(0, |(_, blocks)| blocks.page_size().bytes())
    }
}
