//! The source's question after a sync point: which channels are lost?
//!
//! ```text
//! PING lost k ─▶ Destination::lose ─ FLUSH ─▶ sync ─ PING round ─▶ Destination::round ─▶ PONG agreed, PONG lost k …, PONG round
//! ```

use multifd::wire::ChannelId;

use super::{
    destination::{Destination, refused},
    precopy::Incoming,
};
use crate::{
    connection::Connection,
    error::{Error, Violation},
    format::{Message, ROUND_MARK, ROUND_PING, as_lost_channel, lost_channel},
};

impl<C: Connection> Incoming<C> {
    /// Lets a source of this library continue without a channel whose connection breaks: see
    /// [`Destination::round`]. It must be on at the source as well. Off by default: such a channel ends the migration.
    pub fn channels_may_break(mut self, on: bool) -> Self {
        self.channels_may_break = on;
        self
    }

    /// Executes a PING about lost channels. Returns `false` if this PING is not, or this side does not continue without them: it is
    /// answered like any other then.
    pub(super) fn round_ping<D: Destination>(
        &mut self,
        value: u32,
        destination: &mut D,
    ) -> Result<bool, Error> {
        let lost = as_lost_channel(value);
        if !self.channels_may_break || !self.return_path || value != ROUND_PING && lost.is_none() {
            return Ok(false);
        }
        let (record, at) = ("a question about lost channels", self.line.place());
        let place = match (&self.known.ram, self.postcopy.run) {
            (None, _) => "before the start of ram",
            (_, true) => "after the switch to post-copy",
            _ => {
                match lost {
                    Some(channel) => self.lose(channel, destination)?,
                    None => self.round(destination)?,
                }
                return Ok(true);
            }
        };
        Err(Violation::Misplaced { record, place }.at(at))
    }

    fn lose<D: Destination>(&mut self, channel: ChannelId, destination: &mut D) -> Result<(), Error> {
        let taken = destination.lose(channel);
        taken.map_err(|error| refused(self.line.here(), "a lost channel", error))
    }

    fn round<D: Destination>(&mut self, destination: &mut D) -> Result<(), Error> {
        let lost = destination.round();
        let lost =
            lost.map_err(|error| refused(self.line.here(), "a question about lost channels", error))?;
        let named = lost.into_iter().map(|id| Message::Pong(lost_channel(id)));
        let agreed = std::iter::once(Message::Pong(ROUND_MARK));
        let replies: Vec<_> = agreed.chain(named).chain([Message::Pong(ROUND_PING)]).collect();
        self.line.say_all(&replies)
    }
}
