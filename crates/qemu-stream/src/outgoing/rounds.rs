//! The question after a sync point: what does the destination have of the round that has ended?
//!
//! ```text
//! pages ─ FLUSH ─ EOS ─ PING round ──▶                        each round
//!                 ◀── PONG lost k …, PONG round
//! pages ─ EOS ─ PING lost k ─ PART { FLUSH ─ EOS } ─ PING round ──▶   if channel k broke at this side
//! ```

use std::time::Duration;

use multifd::{Synced, wire::ChannelId};

use super::{Outgoing, Stage, return_path::Agreement};
use crate::{
    connection::Connection,
    error::{Error, Usage},
    format::{Command, Event, ROUND_PING, SyncMode, lost_channel},
};

impl<C: Connection> Outgoing<C> {
    /// Asks which channels are lost, and waits for the reply, `limit` at most: all that are lost so far, in order. `None` if the
    /// destination does not continue without them, or was not asked: the options do not allow it, there is no return path, or the sync
    /// mode is legacy, which allows no message between the pages of a pass and its sync point. Only the first question finds that out.
    pub(super) fn round(&mut self, limit: Option<Duration>) -> Result<Option<Vec<ChannelId>>, Error> {
        let options = &self.options;
        let may_ask = options.channels_may_break
            && options.return_path
            && options.sync_mode == Some(SyncMode::Round)
            && self.agreement != Agreement::Refused;
        if !may_ask {
            return Ok(None);
        }
        self.expect("round", Stage::Between)?;
        self.put(&Event::Command(&Command::Ping(ROUND_PING)))?;
        self.leave(Stage::Between)?;
        let replied = self.replies.wait_for_pong(self.writer.connection(), ROUND_PING, limit);
        // What has arrived after the reply is not seen by the watch of the connection.
        let replied = replied.and_then(|()| self.replies.is_undecided(self.writer.connection()));
        self.finish_write(replied, Stage::Between)?;
        let (agreed, lost) = self.replies.lost_channels();
        self.agreement = if agreed { Agreement::Agreed } else { Agreement::Refused };
        if !agreed {
            tracing::warn!("{NOT_AGREED}");
        }
        self.known_lost.clone_from(&lost);
        Ok(agreed.then_some(lost))
    }

    /// Names channels to the destination that it does not know to be lost, before the sync point at which it waits for all others. In a
    /// pass, the sync point gets a section of its own.
    pub(super) fn name_lost(&mut self, synced: Option<&Synced<'_>>) -> Result<(), Error> {
        let lost = synced.map_or(&[][..], Synced::lost);
        let news: Vec<_> = lost.iter().filter(|id| !self.known_lost.contains(id)).copied().collect();
        let Some(first) = news.first() else { return Ok(()) };
        if self.agreement != Agreement::Agreed || self.stage == Stage::InEnd {
            let why = format!("channel {first} is lost, and the destination waits for its SYNC");
            return Err(Usage::Value { what: "sync point", why }.into());
        }
        let in_pass = self.stage == Stage::InPart;
        if in_pass {
            self.put(&Event::Eos)?;
            self.put(&Event::SectionEnd { footer: self.options.has_footers() })?;
        }
        for id in news {
            self.put(&Event::Command(&Command::Ping(lost_channel(id))))?;
            self.known_lost.push(id);
        }
        if in_pass {
            self.put(&Event::Pass { last: false })?;
        }
        self.leave(self.stage)
    }
}

const NOT_AGREED: &str = "the destination has not agreed to continue without a channel that breaks (channels-may-break is off there, or it \
                          is another program): such a channel ends the migration";
