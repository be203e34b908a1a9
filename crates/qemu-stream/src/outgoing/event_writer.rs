//! Writes a main stream event by event: what [`Events`](crate::incoming::Events) reads, byte by byte as it was.
//!
//! ```text
//! Events ─▶ Event ─▶ EventWriter ─▶ Encoder ─▶ buffer ─▶ connection
//! ```
//!
//! It refuses events out of order. A page waits in the buffer until that is full; every other event leaves before the call
//! returns, for the destination may have to act upon it before more comes.

use std::{fmt, io::Write};

use super::{encoder::Encoder, writer::Writer};
use crate::{
    error::{Error, Usage},
    format::{Event, SyncMark},
};

/// Writes the [events](Event) of a main stream, in their order.
///
/// This is the layer below [`Outgoing`](super::Outgoing), for a program that passes on what it reads. It does not read what the
/// destination replies. See the example of [`Events`](crate::incoming::Events).
pub struct EventWriter<W> {
    writer: Writer<W>,
    encoder: Encoder,
    stage: Stage,
}

/// How far the stream has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Header,
    BeforeRam,
    /// In the first section of RAM.
    Start,
    InPass {
        last: bool,
    },
    /// Behind the EOS of a section of RAM.
    Footer {
        last: bool,
    },
    Between,
    RamDone,
    BehindRam,
    Devices,
    Closed,
    Broken,
}

impl<W> fmt::Debug for EventWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the pages and the state of devices, which are the guest's.
        f.debug_struct("EventWriter").field("stage", &self.stage).finish_non_exhaustive()
    }
}

impl<W: Write> EventWriter<W> {
    /// A stream whose bytes go over `connection`.
    pub fn new(connection: W) -> Self {
        Self { writer: Writer::new(connection), encoder: Encoder::new(), stage: Stage::Header }
    }

    /// Writes an event.
    ///
    /// Pages may stay in the buffer until it is full or another kind of event follows: see [`flush`](Self::flush). Of the devices
    /// in [`Event::End`] what no [`Event::Devices`] and no [`Event::OtherSection`] has brought is written, so a caller may leave
    /// the pieces out.
    ///
    /// # Errors
    /// [`Usage`] if the event is out of order, the block list has no such page, or the devices are not those of this
    /// stream: nothing is written then. If the connection breaks: then nothing more can be written.
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

    /// Writes what is in the buffer: pages of a pass that goes on later.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn flush(&mut self) -> Result<(), Error> {
        let written = self.writer.flush();
        if written.is_err() {
            self.stage = Stage::Broken;
        }
        written
    }

    /// Bytes written and waiting to be.
    pub fn bytes(&self) -> u64 {
        self.writer.bytes()
    }

    /// The connection.
    pub fn get_ref(&self) -> &W {
        self.writer.connection_ref()
    }

    /// The connection, to read replies from. What is written to it stands in the stream.
    pub fn get_mut(&mut self) -> &mut W {
        self.writer.connection()
    }

    /// The connection. Pages that wait in the buffer are lost.
    pub fn into_inner(self) -> W {
        self.writer.into_inner()
    }

    fn out_of_order(&self, event: &Event<'_>) -> Usage {
        let state = match self.stage {
            Stage::Header => "before the configuration",
            Stage::BeforeRam => "before the start of ram",
            Stage::Start => "in the first section of ram",
            Stage::InPass { .. } => "within a pass",
            Stage::Footer { .. } => "behind the end of records",
            Stage::Between => "between two passes",
            Stage::RamDone => "behind the last section of ram",
            Stage::BehindRam => "behind the end of ram",
            Stage::Devices => "among the devices",
            Stage::Closed => "after the end of the stream",
            Stage::Broken => "after the connection broke",
        };
        Usage::OutOfOrder { call: event.name(), state }
    }
}

impl Stage {
    /// The stage behind this event; `None` if it is out of order.
    fn after(self, event: &Event<'_>) -> Option<Self> {
        match (self, event) {
            (Self::Header, Event::Configuration(_)) => Some(Self::BeforeRam),
            (Self::BeforeRam | Self::Between, Event::Command(_))
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

/// Whether nobody has to act upon an event before the next one comes.
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
