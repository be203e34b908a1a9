//! A stream that switches to post-copy, and continues over another connection.

use std::io::Read;

use super::{Events, State};
use crate::{
    error::Error,
    format::{CurrentBlock, DevicePart, Reader},
};

impl<R: Read> Events<R> {
    /// The devices of a source that has switched to post-copy.
    ///
    /// # Errors
    /// If they do not fit their description.
    pub(in crate::incoming) fn switched_devices(&self) -> Result<DevicePart, Error> {
        self.postcopy.devices_now(&self.early, &self.ram, self.here())
    }

    /// Whether the stream can [continue](Self::resume) over another connection.
    pub(in crate::incoming) fn is_resumable(&self) -> bool {
        // The last pieces of other live sections would come a second time.
        self.postcopy.has_switched() && self.postcopy.has_devices() && self.early.ends().is_empty()
    }

    /// Continues over another connection of the same source, which sends no header and no devices again. Places are counted
    /// from the beginning of this connection.
    pub(in crate::incoming) fn resume(&mut self, connection: R) {
        self.earlier += self.r.position();
        self.r = Reader::new(connection, self.r.here().stream);
        self.ram.current = CurrentBlock::default();
        self.state = State::Between;
    }
}
