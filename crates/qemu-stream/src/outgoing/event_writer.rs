//! Writes a main stream event by event. An event that [`Events`](crate::incoming::Events) has read becomes the same bytes.
//!
//! ```text
//! Events ─▶ Event ─▶ EventWriter ─▶ Encoder ─▶ buffer ─▶ connection
//! ```
//!
//! It refuses events that are out of order. Pages are buffered until the buffer is full. After any other event the buffer is
//! written before the call returns, because the destination may have to act before more arrives.

use std::{fmt, io::Write};

use super::{encoder::Encoder, writer::Writer};
use crate::{
    error::{Error, Usage},
    format::{Command, Event, SyncMark},
};

/// Writes the [events](Event) of a main stream, in their order.
///
/// This is the layer below [`Outgoing`](super::Outgoing), for a program that forwards the stream that it reads. It does not read
/// the replies of the destination. See the example of [`Events`](crate::incoming::Events).
pub struct EventWriter<W> {
    writer: Writer<W>,
    encoder: Encoder,
    stage: Stage,
}

/// The progress of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Header,
    BeforeRam,
    /// In the first section of RAM.
    Start,
    InPass {
        last: bool,
    },
    /// After the EOS of a section of RAM.
    Footer {
        last: bool,
    },
    Between,
    /// In the package of post-copy.
    Package,
    RamDone,
    BehindRam,
    Devices,
    Closed,
    Broken,
}

impl<W> fmt::Debug for EventWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Pages and device state belong to the guest and are not printed.
        f.debug_struct("EventWriter").field("stage", &self.stage).finish_non_exhaustive()
    }
}

impl<W: Write> EventWriter<W> {
    /// Writes the stream to `connection`.
    pub fn new(connection: W) -> Self {
        Self { writer: Writer::new(connection), encoder: Encoder::new(), stage: Stage::Header }
    }

    /// Writes an event.
    ///
    /// Pages may stay in the buffer until it is full or another kind of event follows: see [`flush`](Self::flush). For
    /// [`Event::End`] those bytes of the devices are written that no earlier event has contained, so a caller may omit all
    /// [`Event::Devices`], but not those in a package.
    ///
    /// # Errors
    /// [`Usage`] if the event is out of order, the block list has no such page, or the devices are not those of this
    /// stream; nothing is written then. If the connection fails; then nothing more can be written.
    pub fn write(&mut self, event: &Event<'_>) -> Result<(), Error> {
        let next = self.stage.after(event).ok_or_else(|| self.out_of_order(event))?;
        let written = match event {
            Event::End(devices) => {
                let rest = self.encoder.rest(devices)?;
                self.writer.flush().and_then(|()| self.writer.write_through(rest))
            }
            event => {
                self.encoder.encode(event, self.writer.buffer())?;
                if may_wait(event) { self.writer.spill() } else { self.writer.flush() }
            }
        };
        self.stage = if written.is_ok() { next } else { Stage::Broken };
        written
    }

    /// Writes the pages in the buffer. Call it before a pause within a pass.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn flush(&mut self) -> Result<(), Error> {
        let written = self.writer.flush();
        if written.is_err() {
            self.stage = Stage::Broken;
        }
        written
    }

    /// The number of bytes written, including those in the buffer.
    pub fn bytes(&self) -> u64 {
        self.writer.bytes()
    }

    /// The connection.
    pub fn get_ref(&self) -> &W {
        self.writer.connection_ref()
    }

    /// The connection, to read replies. Writing to it damages the stream.
    pub fn get_mut(&mut self) -> &mut W {
        self.writer.connection()
    }

    /// The connection. Pages in the buffer are lost.
    pub fn into_inner(self) -> W {
        self.writer.into_inner()
    }

    fn out_of_order(&self, event: &Event<'_>) -> Usage {
        let state = match self.stage {
            Stage::Header => "before the configuration",
            Stage::BeforeRam => "before the start of ram",
            Stage::Start => "in the first section of ram",
            Stage::InPass { .. } => "within a pass",
            Stage::Footer { .. } => "after the end of records",
            Stage::Between => "between two passes",
            Stage::Package => "in a package",
            Stage::RamDone => "after the last section of ram",
            Stage::BehindRam => "after the end of ram",
            Stage::Devices => "among the devices",
            Stage::Closed => "after the end of the stream",
            Stage::Broken => "after the connection failed",
        };
        Usage::OutOfOrder { call: event.name(), state }
    }
}

impl Stage {
    /// The stage after this event; `None` if the event is out of order.
    fn after(self, event: &Event<'_>) -> Option<Self> {
        match (self, event) {
            (Self::Header, Event::Configuration(_)) => Some(Self::BeforeRam),
            (Self::Between, Event::Command(Command::Packaged(_))) => Some(Self::Package),
            (Self::Package, Event::Command(Command::PostcopyRun)) => Some(Self::Between),
            (Self::Package, Event::Command(Command::Packaged(_))) => None,
            (Self::BeforeRam | Self::Between, Event::Command(_))
            | (Self::Package, Event::Command(_) | Event::Devices(_))
            | (Self::BeforeRam | Self::Between | Self::BehindRam, Event::OtherSection { .. })
            | (Self::Start, Event::SyncMode(_))
            | (Self::Start | Self::InPass { .. }, Event::SyncPoint(_))
            | (Self::InPass { .. }, Event::ZeroPage { .. } | Event::Page { .. } | Event::Xbzrle { .. }) => {
                Some(self)
            }
            (Self::BeforeRam, Event::Blocks { .. }) => Some(Self::Start),
            (Self::Start, Event::Eos) => Some(Self::Footer { last: false }),
            (Self::InPass { last }, Event::Eos) => Some(Self::Footer { last }),
            (Self::Footer { last: false }, Event::SectionEnd { .. }) => Some(Self::Between),
            (Self::Footer { last: true }, Event::SectionEnd { .. }) => Some(Self::RamDone),
            (Self::Between, Event::Pass { last }) => Some(Self::InPass { last: *last }),
            (Self::RamDone, Event::EndOfRam) => Some(Self::BehindRam),
            (Self::BehindRam | Self::Devices, Event::Devices(_)) => Some(Self::Devices),
            (Self::BehindRam | Self::Devices, Event::End(_)) => Some(Self::Closed),
            _ => None,
        }
    }
}

/// Whether the destination does not have to act before the next event.
fn may_wait(event: &Event<'_>) -> bool {
    matches!(
        event,
        Event::Pass { .. }
            | Event::ZeroPage { .. }
            | Event::Page { .. }
            | Event::Xbzrle { .. }
            | Event::SyncMode(_)
            | Event::SyncPoint(SyncMark::Eos)
            | Event::EndOfRam
    )
}
