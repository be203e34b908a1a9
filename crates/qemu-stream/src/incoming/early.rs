//! A guest that runs before its RAM is there: what the reader of main reports to the one that runs it.
//!
//! ```text
//! blocks ─ discard … ─ arm, switched ─ (pages) ─┬─ end
//!                                               └─ paused ─ returned ─ continues ─ (pages) …
//! ```

use std::{fmt::Debug, sync::Arc};

use multifd::{
    Arrived, Result,
    channel::Stop,
    ram::{BlockIndex, PageIndex, RamBlocks},
};

use super::loaded::Loaded;

/// Runs a guest whose RAM is not there. Called by the thread that reads main.
pub(crate) trait RunEarly: Debug + Send + Sync {
    /// The blocks that pages are written to, in place until [`arm`](Self::arm).
    fn blocks(&self, blocks: &Arc<RamBlocks>) -> Result<()>;
    /// These pages are out of date: they must be missing when the memory is armed.
    fn discard(&self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()>;
    /// From now on, a page that has not arrived must cause a fault.
    fn arm(&self, arrived: &Arrived) -> Result<()>;
    /// The guest may run as soon as the source was sent PONGs with these values. Everything but RAM is in `loaded`.
    fn switched(&self, loaded: Loaded, pongs: Vec<u32>);
    /// The source may be asked for pages again: it has returned.
    fn continues(&self);
    /// Waits until it is decided that the guest runs here: RAM is complete.
    fn decided(&self, stop: &Stop) -> Result<()>;
    /// The source is about to learn that this side has failed: if the guest was not confirmed before, it must not be from here on.
    /// Returns whether the guest is the source's.
    fn fails(&self) -> bool;
    /// Why the guest will not run here, if that was decided.
    fn refused(&self) -> Option<multifd::Error>;
}
