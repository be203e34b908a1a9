//! The commands of post-copy.
//!
//! ```text
//! source: ADVISE ─ pre-copy ─ DISCARD* ─ PING ─ PACKAGED { LISTEN, devices, PING, RUN } ─ PING ─ pages ─ END ─ EOF
//!            │                   │                                             │              │
//!            ▼                   ▼                                             ▼              ▼
//!  postcopy_advised           discard                                    postcopy_run   page, end_of_ram
//! ```
//!
//! This side sends no requests for pages, because the guest does not run here before all have arrived. So the source sends them in
//! its own order. If the connection breaks after RUN, the source can return over another one:
//!
//! ```text
//! source: RECV_BITMAP of each block ─ POSTCOPY_RESUME ─ pages ─ END ─ EOF
//!               │ arrived                    │ RESUME_ACK
//! ```
//!
//! A source with `postcopy-ram` on that does not switch ends as in pre-copy.

#[cfg(feature = "fault")]
use std::time::Duration;
use std::{mem, sync::Arc};

use multifd::ram::{BlockIndex, BlockName, PageIndex, PageSize};

#[cfg(feature = "fault")]
use super::early::RunEarly;
use super::{
    destination::{Destination, refused},
    known::Postcopy,
    line::BeforeRefusal,
    precopy::Incoming,
};
use crate::{
    connection::Connection,
    error::{Error, Violation},
    format::{Command, LOADED_PING, Message},
    refuse,
};

impl<C: Connection> Incoming<C> {
    /// Lets the source switch to post-copy: it stops its guest for good, and sends the pages that this side lacks after the
    /// devices. This side does not run the guest before all of them have arrived, so the guest is stopped for longer than with a
    /// destination that runs it at once; but the migration of a guest that writes faster than its pages are sent comes to an end.
    /// Off by default: the switch is refused, and the guest continues at the source. A source with capability `postcopy-ram` on
    /// that does not switch is always received.
    ///
    /// **Warning:** if this side fails after the switch, or the connection breaks, the guest can stay stopped at the source for good
    /// (QEMU 7.2 always, QEMU 10.0 if the connection breaks). Only its process still has it then.
    pub fn postcopy(mut self, on: bool) -> Self {
        self.postcopy.served = on;
        self
    }

    /// What to do when this side has failed after the switch, before the source is informed.
    pub(crate) fn before_refusal(mut self, call: BeforeRefusal) -> Self {
        self.postcopy.before_refusal = call;
        self
    }

    /// The guest runs as soon as the source has switched: PONGs of the package wait for it.
    #[cfg(feature = "fault")]
    pub(crate) fn run_early(mut self, early: Arc<dyn RunEarly>) -> Self {
        self.postcopy.early = Some(early);
        self
    }

    /// Whether the source has switched to post-copy. From then on it does not continue its guest by itself.
    pub fn has_switched(&self) -> bool {
        self.postcopy.run
    }

    /// Executes a command that only a source with post-copy sends, or refuses it.
    pub(super) fn postcopy_command<D: Destination>(
        &mut self,
        command: &Command,
        destination: &mut D,
    ) -> Result<(), Error> {
        let at = self.line.place();
        let Postcopy { served, advised, listening, run, resuming, .. } = &self.postcopy;
        let (served, advised, listening, run, resuming) = (*served, *advised, *listening, *run, *resuming);
        match command {
            Command::PostcopyAdvise(Some(_)) => {
                let misplaced = |place| Violation::Misplaced { record: "POSTCOPY_ADVISE", place }.at(at);
                if self.known.ram.is_some() {
                    return Err(misplaced("after the start of ram"));
                }
                if !self.return_path {
                    return Err(misplaced("without a return path"));
                }
                if advised {
                    return Err(misplaced("twice in one stream"));
                }
                tracing::debug!(served, "the source may switch to post-copy");
                self.postcopy.advised = true;
                if served {
                    self.line.read_to_end();
                }
                let taken = destination.postcopy_advised();
                taken.map_err(|e| refused(self.line.here(), "post-copy", e))
            }
            Command::PostcopyRamDiscard { block, ranges }
                if served && advised && self.known.ram.is_some() =>
            {
                let (index, page_size) = self.find(block)?;
                for (start, length) in ranges {
                    let first = PageIndex(start / page_size.bytes() as u64);
                    let count = length / page_size.bytes() as u64;
                    let taken = destination.discard(index, first, count);
                    taken.map_err(|e| refused(at, "pages to be discarded", e))?;
                }
                Ok(())
            }
            Command::Packaged(length) if served && advised => {
                tracing::debug!(length, "the source switches to post-copy");
                Ok(())
            }
            // Outside of a package they make no sense. A package has each of them once.
            Command::PostcopyListen if served && self.line.is_in_package() && !listening => {
                self.postcopy.listening = true;
                Ok(())
            }
            // Its PONG is how the source learns who has the guest: without it, both sides could.
            Command::PostcopyRun
                if self.postcopy.early.is_some() && !self.postcopy.withheld.contains(&LOADED_PING) =>
            {
                let place = "without a PING 3 before it";
                Err(Violation::Misplaced { record: "POSTCOPY_RUN", place }.at(at))
            }
            Command::PostcopyRun if served && listening && !run => {
                self.postcopy.run = true;
                self.guest_stands = true;
                let before_refusal = self.take_before_refusal();
                self.line.switch(before_refusal);
                let taken = destination.postcopy_run();
                taken.map_err(|e| refused(self.line.here(), "the switch to post-copy", e))?;
                if let Some(early) = self.postcopy.early.clone() {
                    early.switched(self.switched()?, mem::take(&mut self.postcopy.withheld));
                }
                Ok(())
            }
            Command::RecvBitmap(name) if resuming => {
                let (index, _) = self.find(name)?;
                let bitmap = self.bitmap(index, destination);
                self.line.say(&Message::RecvBitmap { block: name.clone(), bitmap })
            }
            Command::PostcopyResume if resuming => {
                self.postcopy.resuming = false;
                self.line.say(&Message::ResumeAck)?;
                if let Some(early) = &self.postcopy.early {
                    early.continues();
                }
                Ok(())
            }
            other => Err(refuse::command(other, at)),
        }
    }

    /// What is done before the source learns of a failure.
    fn take_before_refusal(&mut self) -> BeforeRefusal {
        let before = mem::take(&mut self.postcopy.before_refusal);
        // A source of this library keeps its guest stopped, and shows the reason.
        let ours = self.postcopy.ours;
        match self.postcopy.early.clone() {
            None => before,
            Some(early) => BeforeRefusal(Some(Arc::new(move || {
                let is_theirs = early.fails();
                let tells = if let BeforeRefusal(Some(before)) = &before { before() } else { true };
                tells && (is_theirs || ours)
            }))),
        }
    }

    /// Whether the source can return after this error.
    pub(super) fn is_interrupted(&self, error: &Error) -> bool {
        let broken = match error {
            Error::Io { .. } | Error::Cut { .. } | Error::SourceGone { .. } => true,
            Error::TimedOut { .. } => self.postcopy.early.is_some(),
            // A channel has broken.
            Error::Destination { source, .. } => source
                .downcast_ref::<multifd::Error>()
                .is_some_and(|error| error.fault() == multifd::Fault::Connection),
            _ => false,
        };
        broken && (self.postcopy.run && self.line.is_resumable() || self.may_have_switched())
    }

    /// Whether the source may believe that it has sent the command to run the guest, which has not arrived. It returns, and has to
    /// learn that. Only a source of this library does.
    fn may_have_switched(&self) -> bool {
        let Postcopy { asked, run, ours, early, .. } = &self.postcopy;
        *asked && !run && *ours && early.is_some()
    }

    /// Continues over the connection with which the source has returned.
    /// `why`: what has broken the earlier one.
    pub(super) fn resume<D: Destination>(
        &mut self,
        connection: C,
        destination: &mut D,
        why: String,
    ) -> Result<(), Error> {
        self.line.resume(connection);
        if !self.postcopy.run {
            let at = self.line.here();
            let source =
                format!("the guest was never here, because the connection broke before ({why})").into();
            return Err(Error::Destination { at, what: "the return of the source", source });
        }
        self.postcopy.resuming = true;
        let taken = destination.postcopy_resumed();
        taken.map_err(|e| refused(self.line.here(), "the return of the source", e))
    }

    /// Reports that everything is here, and waits for a sign that the source has got it, for `limit` at most. Returns whether it has.
    #[cfg(feature = "fault")]
    pub(crate) fn part(&mut self, limit: Duration) -> bool {
        let told = self.line.shut(0).and_then(|()| self.line.limit(Some(limit)));
        if !self.postcopy.ours {
            return told.is_ok();
        }
        told.is_ok() && self.line.get_mut().read(&mut [0; 16]).is_ok_and(|read| read > 0)
    }

    /// Serves a source that has returned although everything is here.
    ///
    /// # Errors
    /// If the connection breaks again.
    #[cfg(feature = "fault")]
    pub(crate) fn serve_again<D: Destination>(
        &mut self,
        connection: C,
        destination: &mut D,
    ) -> Result<(), Error> {
        self.resume(connection, destination, String::new())?;
        self.read(destination).map(drop)
    }

    /// The pages of a block that have arrived, as RECV_BITMAP has them.
    fn bitmap<D: Destination>(&self, index: BlockIndex, destination: &D) -> Vec<u8> {
        let entry =
            self.known.ram.as_ref().and_then(|(_, list)| Some((list.entry(index)?, list.page_size())));
        let pages = entry.map_or(0, |(entry, page_size)| page_size.whole_pages_in(entry.used_length));
        match destination.arrived(index) {
            Some(arrived) => arrived.words().flat_map(u64::to_le_bytes).collect(),
            None => (0..pages.div_ceil(64)).flat_map(|_| [0; 8]).collect(),
        }
    }

    /// The block of this name, and its page size.
    fn find(&self, name: &BlockName) -> Result<(BlockIndex, PageSize), Error> {
        let found =
            self.known.ram.as_ref().and_then(|(_, list)| Some((list.position(name)?, list.page_size())));
        found.ok_or_else(|| Violation::UnknownBlock(name.clone()).at(self.line.place()))
    }
}
