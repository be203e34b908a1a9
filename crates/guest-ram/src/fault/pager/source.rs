//! Where pages come from, and what happens if they do not come.

use std::{error::Error, fmt, time::Duration};

use crate::{BlockIndex, PageBitmap, PageRun};

/// Why a page cannot be loaded.
pub type LoadError = Box<dyn Error + Send + Sync>;

/// A source of pages: a file, another process, a network. Several threads load at the same time.
pub trait PageSource: Send + Sync {
    /// The pages of a block that may be nonzero. All others are zero, and are never loaded. `None`: any page may be. Called once
    /// for each block, before the memory is served.
    ///
    /// # Errors
    /// If this is not known.
    fn contents(&self, block: BlockIndex) -> Result<Option<PageBitmap>, LoadError>;

    /// Fills `into`, which begins at a page boundary, with the bytes of these pages, which are whole host pages; the bytes after the last page of a block stay as they
    /// are. It may wait as long as it must, until [`stop`](Self::stop).
    ///
    /// # Errors
    /// If one of the pages cannot be had, or is not what it should be. The pages of a run are then loaded one by one, and the
    /// [judge](super::PagerOptions::judge) decides about each that fails.
    fn load(&self, run: PageRun, into: &mut [u8]) -> Result<(), LoadError>;

    /// Ends every [`load`](Self::load) that waits, and those to come: the pager ends. Called at least once, from any thread.
    fn stop(&self) {}
}

/// Pages that do not come.
#[derive(Debug)]
pub struct Trouble {
    /// The pages.
    pub run: PageRun,
    /// What happened.
    pub kind: TroubleKind,
    /// How long ago they were first needed.
    pub since: Duration,
    /// Whether a thread of the guest is known to wait for one of them.
    pub is_awaited: bool,
    /// How often this was decided before, for these pages.
    pub decided: u32,
}

/// What happened to pages that do not come.
#[derive(Debug)]
#[non_exhaustive]
pub enum TroubleKind {
    /// The source or the system refused.
    Failed(LoadError),
    /// The source panicked, with this message.
    Panicked(String),
    /// The source has not answered.
    Silent,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PageRun { block, first, count } = self.run;
        write!(f, "{count} pages from page {first} of block {} on ", block.0)?;
        match &self.kind {
            TroubleKind::Failed(error) => write!(f, "cannot be loaded: {error}"),
            TroubleKind::Panicked(message) => write!(f, "cannot be loaded: their source panicked: {message}"),
            TroubleKind::Silent => write!(f, "have not come for {:.1} s", self.since.as_secs_f64()),
        }
    }
}

/// What is done about [`Trouble`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Wait for the source, or ask it again if it has failed. The guest's threads that need the pages wait meanwhile. The judge is
    /// asked again after the same time.
    Wait,
    /// Poison the pages: a thread that accesses them gets an [error](super::super::Armed::poison), and everything else continues.
    Poison,
    /// End the pager: all pages that are missing are poisoned.
    Stop,
}

/// The decision if the embedder makes none: wait for a silent source, poison what cannot be had.
pub(super) fn default_decision(trouble: &Trouble) -> Decision {
    match trouble.kind {
        TroubleKind::Silent => Decision::Wait,
        TroubleKind::Failed(_) | TroubleKind::Panicked(_) => Decision::Poison,
    }
}
