//! Channels that break, in a migration that continues without them.
//!
//! ```text
//! tolerate ─▶ pages are recorded ─▶ sync ─▶ reply: lost channels ─▶ settle ─▶ their pages are pending again
//! ```

use super::{Sender, given::Given};
use crate::{
    error::{Error, Result, Violation},
    ram::PageBitmap,
    wire::ChannelId,
};

impl Sender {
    /// The destination has agreed to continue without a channel whose connection breaks. From now on such a channel is
    /// [lost](super::Synced::lost), unless it is the last one, and what each channel is given is recorded. Called before a page is
    /// queued.
    pub(crate) fn tolerate(&mut self) -> Result<()> {
        if let Some(closed) = &self.closed {
            closed.shut_down();
        }
        let (channels, shared) = (self.options.channels, self.shared()?);
        shared.given.get_or_init(|| Given::new(channels, &shared.blocks));
        shared.dispatch.tolerate();
        Ok(())
    }

    /// The destination has everything up to the last [`sync`](Self::sync), except what the channels in `lost` were given since its reply
    /// before. These pages are set in `again`, one bitmap for each block. Returns their number.
    ///
    /// # Errors
    /// If there is no such channel, no channel remains, or the destination has not named a channel that is lost here.
    pub(crate) fn settle(&mut self, lost: &[ChannelId], again: &[PageBitmap]) -> Result<u64> {
        let shared = self.shared()?;
        let refused = |id: ChannelId, why| {
            let error = Error::from(Violation::LostChannel { id, why });
            Err(shared.stop.fail(error))
        };
        if let Some(id) = lost.iter().find(|id| id.0 >= self.options.channels) {
            return refused(*id, "the destination reported it as broken, but there is no such channel");
        }
        if let Some(id) = shared.dispatch.lost().iter().find(|id| !lost.contains(id)) {
            return refused(*id, "the destination was informed that it is broken, and did not confirm that");
        }
        for id in lost {
            if !shared.dispatch.lose(*id) {
                let error = Error::io("use the channels", std::io::ErrorKind::ConnectionReset.into());
                return Err(shared.stop.fail(error.on_channel(*id)));
            }
        }
        Ok(shared.given.get().map_or(0, |given| given.settle(lost, again)))
    }
}
