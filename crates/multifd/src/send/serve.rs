//! After the switch to post-copy, each channel takes its next pages from the schedule.
//!
//! ```text
//! Schedule ─ requested ─▶ the channel for requests ─▶ packets
//!     └───── walk ──────▶ every other channel ──────▶ packets
//! ```

use std::{sync::Arc, time::Duration};

use super::{Sender, serving::Serving};
use crate::{
    error::{Error, Result, Usage},
    postcopy::Schedule,
};

impl Sender {
    /// Sends what `schedule` has, over all channels, until it has nothing more. A [`sync`](Self::sync) must follow. The guest must be
    /// stopped: no page may change. With two or more channels, one is kept free for requested pages. `answered` is called for each
    /// request when its pages were written, with the time since it came.
    ///
    /// The schedule is closed at the end. If the migration is stopped, the caller must close it, or this call waits.
    ///
    /// # Errors
    /// The error that stopped the migration, or that of a sender that is not connected.
    pub fn serve(
        &mut self,
        schedule: &Arc<Schedule>,
        answered: impl Fn(Duration) + Send + Sync + 'static,
    ) -> Result<()> {
        self.ready()?;
        if !self.hand.is_empty() {
            return Err(Usage::Unsynced.into());
        }
        let shared = self.shared()?;
        // A channel that is lost before this is not among them, and from here on none may be lost.
        let all = shared.dispatch.living();
        let serving = Arc::new(Serving::new(schedule.clone(), all, answered));
        shared.dispatch.begin_serve(serving);
        shared.dispatch.wait_served((all - 1).max(1));
        let all_sent = schedule.drained();
        // The channel for requests ends when nothing can be requested any more.
        schedule.close();
        shared.dispatch.end_serve(&shared.stop)?;
        if all_sent { Ok(()) } else { Err(Error::Cancelled) }
    }
}
