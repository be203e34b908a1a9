//! A machine that runs before its RAM is there: post-copy, on the destination's side.
//!
//! ```text
//! Announced ─ load_early ─┬─ Landing::Complete(Pending)        the source did not switch: as in pre-copy
//!                         └─ Landing::Early(Early) ─ confirm ─▶ Running ─ finish ─▶ Finished
//!                            devices are here,      the guest    pages come,        all of RAM is here
//!                            the guest is not ours  is ours      requested first
//!
//! multifdmain: main ─▶ pages, bitmaps, the end        ramfault_N: faults ─▶ requests ─▶ main
//! ```
//!
//! Until [`Early::confirm`] has returned, the guest is the source's, and any failure gives it back. From then on it is only ours, and
//! so is the decision about pages that do not come.

mod field;
mod finished;
mod options;
mod running;
mod state;

pub use finished::Finished;
pub use options::EarlyOptions;
pub use running::Running;

use std::{
    fmt,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use multifd::{
    ChannelStats, Error, Receiver, Result,
    channel::{Stop, Stream},
    error::Usage,
    live::RunState,
    ram::{PagerStats, RamBlocks},
};

use super::{Announced, Pending};
use crate::{
    format::{BlockList, Configuration, DeviceSection},
    incoming::{Incoming, Loaded, Loader, LoaderState},
};
pub(super) use field::Field;
use finished::Done;
use state::Phase;

/// What has arrived when a machine can run.
#[derive(Debug)]
#[must_use = "if it is dropped, the guest stays at the source"]
pub enum Landing {
    /// All of it: the source did not switch to post-copy.
    Complete(Box<Pending>),
    /// Everything but a part of RAM.
    Early(Box<Early>),
}

/// Everything has arrived but a part of RAM, which follows. The source still owns the guest. When dropped, it informs the source to
/// keep the guest.
///
/// Memory may be accessed: an access to a page that is missing waits until the page has arrived.
#[must_use = "if it is dropped, the guest stays at the source"]
pub struct Early {
    field: Arc<Field>,
    loaded: Loaded,
    blocks: Arc<RamBlocks>,
    stop: Stop,
    /// Reads main; `None` after the machine was confirmed or refused.
    thread: Option<JoinHandle<Result<Done>>>,
}

impl fmt::Debug for Early {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Early").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

impl Announced {
    /// Receives RAM and devices, like [`load`](Self::load), from a source that may switch to post-copy: then the machine runs before
    /// its RAM is there. Needs [`ArrivalOptions::run_early`](super::ArrivalOptions::run_early). The blocks must be in memory that is not
    /// shared with another process that accesses it.
    ///
    /// # Errors
    /// As [`load`](Self::load); if the memory cannot be armed, or this process may not receive its page faults.
    pub fn load_early(self, blocks: RamBlocks, options: EarlyOptions) -> Result<Landing> {
        let Some(field) = self.early.clone() else {
            let why = "load_early needs ArrivalOptions::run_early";
            return Err(self.refuse(Error::text(why)));
        };
        field.set_options(options);
        let stop = self.receiver.stop().clone();
        let (runs, span) = (field.clone(), tracing::Span::current());
        let thread = Builder::new().name("multifdmain".into()).spawn(move || {
            let _ended = Ended(runs.clone());
            span.in_scope(|| self.land(blocks, &runs))
        });
        let thread = thread.map_err(|error| stop.fail(Error::io("start a thread", error)))?;
        if let Some((loaded, blocks)) = field.state.wait_switched() {
            let early = Early { field, loaded, blocks, stop, thread: Some(thread) };
            return Ok(Landing::Early(Box::new(early)));
        }
        match thread.join() {
            Ok(Ok(Done::Complete(pending))) => Ok(Landing::Complete(pending)),
            Ok(Ok(Done::Finished(_))) => Err(Error::Cancelled),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(stop.fail(Error::text(PANICKED))),
        }
    }

    /// Reads main to its end.
    fn land(self, blocks: RamBlocks, field: &Field) -> Result<Done> {
        let (pending, state) = self.load_whole(blocks)?;
        if !pending.loaded().postcopy {
            return Ok(Done::Complete(Box::new(pending)));
        }
        let faults = match field.finish() {
            Ok(faults) => faults,
            Err(error) => return Err(pending.refuse(Error::other("complete the memory of the guest", error))),
        };
        // The guest is ours, and complete, whatever happens from here on.
        field.state.completed();
        let Pending { incoming, receiver, blocks, .. } = pending;
        let channels = part(incoming, receiver, state, field);
        Ok(Done::Finished(Finished { blocks, faults, threads: field.threads(), channels }))
    }
}

/// Informs the source that all of RAM is here. If it may not have got that, it is waited for, because it returns.
fn part(
    mut incoming: Incoming<Stream>,
    receiver: Receiver,
    state: LoaderState,
    field: &Field,
) -> Vec<ChannelStats> {
    let make = |_: Option<&Configuration>, _: &BlockList| Err(Usage::UsedTwice.into());
    let mut loader = Loader::resumed(&receiver, state, make);
    let begun = Instant::now();
    while !incoming.part(PARTS) {
        let left = RETURNS.saturating_sub(begun.elapsed());
        let returned = receiver.wait_resumed(Some(left)).ok().and_then(|stream| stream.share().ok());
        let Some((stream, writer)) = returned else {
            tracing::warn!(
                "the source may not know that all of RAM has arrived, and has not returned to ask"
            );
            break;
        };
        field.connected(writer);
        if let Err(error) = incoming.serve_again(stream, &mut loader) {
            tracing::debug!(%error, "the source has returned, and its connection broke again");
        }
    }
    drop(loader);
    let counters = receiver.counters();
    let stats = receiver.finish().unwrap_or_else(|error| {
        tracing::debug!(%error, "the channels did not end cleanly");
        counters.stats()
    });
    drop(incoming);
    stats
}

/// How long the source may take to say that it has got SHUT.
const PARTS: Duration = Duration::from_secs(5);
/// How long a source that may not have got it is waited for.
const RETURNS: Duration = Duration::from_secs(10);

/// Reports the end of the thread that reads main, also after a panic.
struct Ended(Arc<Field>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.state.ended();
    }
}

impl Early {
    /// The machine's blocks.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// What arrived besides RAM.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// The device with this name and instance: its section and its state.
    pub fn device(&self, name: &str, instance: u32) -> Option<(&DeviceSection, &[u8])> {
        self.loaded.device(name, instance)
    }

    /// What the faults have cost so far.
    pub fn stats(&self) -> PagerStats {
        self.field.stats()
    }

    /// Takes the guest over: the source is informed, and from now on the guest is ours. If the connection is broken, this waits until
    /// the source has returned, for [`pause_timeout`](super::ArrivalOptions::pause_timeout) at most.
    ///
    /// # Errors
    /// If the source has taken its guest back, or could not be informed: the guest must not run here.
    pub fn confirm(mut self) -> Result<Running> {
        match self.field.confirm() {
            Ok(()) => {
                let thread = self.thread.take();
                let guest = self.loaded.run_state().unwrap_or(RunState::Running);
                let (field, blocks, stop) = (self.field.clone(), self.blocks.clone(), self.stop.clone());
                Ok(Running::new(field, blocks, stop, guest, thread))
            }
            Err(Phase::Refused(error)) => Err(error),
            Err(_) => Err(self.ended()),
        }
    }

    /// Informs the source that its guest continues there, because of `error`. If the connection is broken, this waits for the source as
    /// [`confirm`](Self::confirm) does. Returns `error`.
    pub fn refuse(mut self, error: Error) -> Error {
        self.give_back(error.clone());
        error
    }

    /// Why the thread that reads main has ended.
    fn ended(&mut self) -> Error {
        let error = self.thread.take().and_then(|thread| thread.join().ok()?.err());
        error.or_else(|| self.stop.error()).unwrap_or(Error::Cancelled)
    }

    fn give_back(&mut self, error: Error) {
        let Some(thread) = self.thread.take() else { return };
        // A source that is away learns it when it returns; until then nothing is stopped.
        if !self.field.refuse(error.clone()) {
            self.stop.fail(error);
        }
        // A panic of the thread has failed the stop.
        let _ = thread.join();
        self.field.abandon();
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.give_back(Error::text(
            "the destination's program has dropped the machine before it took it over",
        ));
    }
}

const PANICKED: &str = "the thread that reads the main stream has panicked";
