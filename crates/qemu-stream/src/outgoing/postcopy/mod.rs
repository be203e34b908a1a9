//! Post-copy: the guest runs at the destination before its RAM is there.
//!
//! ```text
//!            opening, package ─────────────▶ main ────────────▶ the guest runs
//! RamBlocks ─▶ walk ───────────────────────▶ main ────────────▶ pages, in the background
//!      └─────▶ pages that were requested ──▶ main or preempt ─▶ a waiting thread of the guest continues
//!                    ▲
//!                Schedule ◀── Replies ◀──── return path ◀────── faults
//! ```
//!
//! A [`PostcopySource`] has a machine that does not run and does not change: in a file, or stopped for good. So nothing is lost
//! when a connection breaks: the destination pauses, and a [later call](PostcopySource::resume), also of another process,
//! sends what it reports as missing.

mod contents;
mod control;
mod failure;
mod moved;
mod opening;
mod options;
mod pages;
mod progress;
mod replies;
mod requests;
mod run;
mod serve;
mod session;

use std::{fmt, sync::Arc};

use multifd::{
    channel::{Connect, Stop},
    ram::{BlockIndex, PageBitmap, RamBlocks},
};

use super::options::Options;
use crate::{
    error::Usage,
    format::{BlockList, DevicePart},
};
use contents::Contents;
pub use control::PostcopyControl;
pub use failure::{GuestAt, PostcopyError};
pub(crate) use moved::follow;
pub use moved::{Interrupted, Moved};
pub(super) use opening::{DISCARDED, Machine};
pub use options::PostcopyOptions;
pub use progress::{PostcopyInfo, PostcopyProgress};
pub(crate) use requests::Requests;
use run::{Begin, run};

/// A machine whose guest runs at the destination while its pages follow.
pub struct PostcopySource(Contents);

impl fmt::Debug for PostcopySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostcopySource").field("options", &self.0.options).finish_non_exhaustive()
    }
}

impl PostcopySource {
    /// Creates the source of a machine that does not run: its stream, block list, devices, and memory. A page that cannot be
    /// read is not sent: all others are, and then the migration fails. The guest waits for that page, and
    /// [`resume`](Self::resume) can send it when it can be read.
    ///
    /// # Errors
    /// If `blocks` are not those of the list, a host page size does not fit its block, or the machine has state that post-copy
    /// does not carry.
    pub fn new(
        stream: Options,
        list: &BlockList,
        devices: DevicePart,
        blocks: Arc<RamBlocks>,
        options: PostcopyOptions,
    ) -> Result<Self, Usage> {
        Contents::new(stream.sync_mode(None), list, devices, blocks, options).map(Self)
    }

    /// Sends these pages before the guest starts, such as those that were [needed](Self::needed) at an earlier start.
    /// The guest starts later by the time that they take, and makes fewer requests. Pages that do not exist are ignored.
    pub fn send_first(&mut self, block: BlockIndex, pages: &PageBitmap) {
        self.0.send_first(block, pages);
    }

    /// The pages that the guest has needed so far, block by block: those that were requested, and those that were [sent
    /// first](Self::send_first).
    pub fn needed(&self) -> impl Iterator<Item = PageBitmap> + '_ {
        self.0.requested.iter().zip(&self.0.first).map(|(requested, first)| {
            let needed = PageBitmap::new(requested.pages());
            needed.merge(requested.words());
            needed.merge(first.words());
            needed
        })
    }

    /// The numbers of the migration, for another thread to read.
    pub fn progress(&self) -> PostcopyProgress {
        PostcopyProgress(self.0.counts.clone())
    }

    /// Changes the migration while it runs, for another thread.
    pub fn control(&self) -> PostcopyControl {
        self.0.control.clone()
    }

    /// Connects, starts the guest at the destination, and sends its pages. Returns when the destination has reported that it
    /// has all of them. `stop` cancels from any thread; after the guest was started, a cancel interrupts the migration, and
    /// the guest waits at the destination.
    ///
    /// # Errors
    /// What has failed, and which side has the guest.
    pub fn start(&mut self, connector: &dyn Connect, stop: &Stop) -> Result<(), PostcopyError> {
        run(&self.0, stop, Begin::Start(connector))
    }

    /// Continues a migration whose connections have broken: connects to a destination in state `postcopy-paused` that was
    /// given the command `migrate-recover`, and sends the pages that it reports as missing. It need not be the object, nor the
    /// process, that started the guest.
    ///
    /// # Errors
    /// What has failed. The guest is at the destination in every case.
    pub fn resume(&mut self, connector: &dyn Connect, stop: &Stop) -> Result<(), PostcopyError> {
        self.0.counts.recovers();
        let resumed = run(&self.0, stop, Begin::Resume(connector, None));
        resumed.map_err(|failed| PostcopyError { guest: GuestAt::Destination, ..failed })
    }
}
