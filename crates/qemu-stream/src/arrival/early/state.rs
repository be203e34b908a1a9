//! How far a machine that runs early is. The thread of main, the embedder and the threads of faults meet here.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use multifd::{
    Error,
    channel::{SharedWriter, Stop},
    ram::{BlockIndex, PageRun, RamBlocks, RequestPages},
};

use crate::{format::Message, incoming::Loaded};

/// Who has the guest, as this side knows it.
#[derive(Debug, Default)]
pub(super) enum Phase {
    /// Pages are written in place. The guest is the source's.
    #[default]
    Loading,
    /// Everything but RAM is here, and the embedder decides. The guest is the source's.
    Switched,
    /// The guest is ours.
    Confirmed,
    /// The guest stays at the source.
    Refused(Error),
    /// The guest stays at the source, because the thread of main has failed before the embedder decided.
    Failed,
}

/// The state, and the source that pages are requested from.
#[derive(Debug, Default)]
pub(super) struct State {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// The block of the last request on this connection.
    last: Mutex<Option<BlockIndex>>,
}

#[derive(Debug, Default)]
struct Inner {
    phase: Phase,
    loaded: Option<Loaded>,
    /// The source takes it from these PONGs that the guest runs here.
    pongs: Vec<u32>,
    /// The source is being informed that the guest is ours.
    confirming: bool,
    /// `None` while the connection is broken.
    writer: Option<SharedWriter>,
    /// The source answers requests.
    answers: bool,
    blocks: Option<Arc<RamBlocks>>,
    /// The thread of main has ended.
    ended: bool,
    /// All of RAM is here.
    complete: bool,
}

impl State {
    pub(super) fn blocks(&self, blocks: &Arc<RamBlocks>) {
        self.lock().blocks = Some(blocks.clone());
    }

    /// The source is connected, and replies go here.
    pub(super) fn connected(&self, writer: SharedWriter) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.lock().writer = Some(writer);
        self.changed.notify_all();
    }

    /// The connection is broken.
    pub(super) fn paused(&self) {
        let mut inner = self.lock();
        (inner.writer, inner.answers) = (None, false);
    }

    pub(super) fn is_paused(&self) -> bool {
        let inner = self.lock();
        inner.writer.is_none() && !inner.ended
    }

    /// Everything but RAM is here.
    pub(super) fn switched(&self, loaded: Loaded, pongs: Vec<u32>) {
        let mut inner = self.lock();
        (inner.loaded, inner.pongs, inner.answers) = (Some(loaded), pongs, true);
        if matches!(inner.phase, Phase::Loading) {
            inner.phase = Phase::Switched;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// The source answers requests again.
    pub(super) fn answers(&self) {
        let mut inner = self.lock();
        inner.answers = true;
        let is_confirmed = matches!(inner.phase, Phase::Confirmed);
        let (writer, bytes) = (inner.writer.clone().filter(|_| is_confirmed), pongs(&inner.pongs));
        drop(inner);
        self.changed.notify_all();
        if let Some(writer) = writer {
            // It may not have got them. If the connection breaks again, the thread of main finds it.
            let _ = writer.write_all(&bytes);
        }
    }

    /// All of RAM is here.
    pub(super) fn completed(&self) {
        self.lock().complete = true;
        self.changed.notify_all();
    }

    pub(super) fn ended(&self) {
        let mut inner = self.lock();
        (inner.ended, inner.writer) = (true, None);
        drop(inner);
        self.changed.notify_all();
    }

    /// Waits until everything but RAM is here. `None` if the thread of main has ended before.
    pub(super) fn wait_switched(&self) -> Option<(Loaded, Arc<RamBlocks>)> {
        let mut inner = self.lock();
        loop {
            if let (Some(loaded), Some(blocks)) = (inner.loaded.take(), inner.blocks.clone()) {
                return Some((loaded, blocks));
            }
            if inner.ended {
                return None;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Informs the source that the guest runs here, as soon as it is connected.
    ///
    /// # Errors
    /// If that cannot happen any more.
    pub(super) fn confirm(&self) -> Result<(), Phase> {
        let mut inner = self.lock();
        loop {
            match &inner.phase {
                Phase::Confirmed => return Ok(()),
                Phase::Refused(error) => return Err(Phase::Refused(error.clone())),
                Phase::Failed => return Err(Phase::Failed),
                Phase::Loading | Phase::Switched if inner.ended => return Err(Phase::Loading),
                Phase::Loading | Phase::Switched => {}
            }
            // After a return, the source first asks what has arrived.
            if let Some(writer) = inner.writer.clone().filter(|_| inner.answers) {
                let bytes = pongs(&inner.pongs);
                inner.confirming = true;
                drop(inner);
                let written = writer.write_all(&bytes);
                inner = self.lock();
                inner.confirming = false;
                if written.is_ok() {
                    inner.phase = Phase::Confirmed;
                    drop(inner);
                    self.changed.notify_all();
                    return Ok(());
                }
                // The thread of main finds that as well.
                (inner.writer, inner.answers) = (None, false);
                self.changed.notify_all();
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread of main is about to send that this side has failed. If the guest is not ours yet, it never will be: the source takes it
    /// back. A confirmation that is being sent comes before; its write has the limits of the connection. Returns whether the guest is the
    /// source's.
    pub(super) fn fails(&self) -> bool {
        let inner = self.changed.wait_while(self.lock(), |inner| inner.confirming);
        let mut inner = inner.unwrap_or_else(PoisonError::into_inner);
        if matches!(inner.phase, Phase::Loading | Phase::Switched) {
            inner.phase = Phase::Failed;
        }
        let is_confirmed = matches!(inner.phase, Phase::Confirmed);
        drop(inner);
        self.changed.notify_all();
        !is_confirmed
    }

    /// The guest stays at the source. Returns whether the source is away, and learns it when it returns.
    pub(super) fn refuse(&self, error: Error) -> bool {
        let mut inner = self.lock();
        inner.phase = Phase::Refused(error);
        let is_away = inner.writer.is_none() && !inner.ended;
        drop(inner);
        self.changed.notify_all();
        is_away
    }

    pub(super) fn refused(&self) -> Option<Error> {
        match &self.lock().phase {
            Phase::Refused(error) => Some(error.clone()),
            _ => None,
        }
    }

    /// Waits until the guest is ours.
    ///
    /// # Errors
    /// Why it stays at the source; an error of the connection, if the source cannot be informed because that is broken; that of `stop`.
    pub(super) fn wait_decided(&self, stop: &Stop) -> multifd::Result<()> {
        let mut inner = self.lock();
        loop {
            match &inner.phase {
                Phase::Confirmed => return Ok(()),
                Phase::Refused(error) => return Err(error.clone()),
                Phase::Failed => return Err(Error::Cancelled),
                Phase::Loading | Phase::Switched => stop.check()?,
            }
            if inner.writer.is_none() {
                return Err(Error::io("inform the source", io::ErrorKind::NotConnected.into()));
            }
            // The stop does not wake it.
            inner = self.changed.wait_timeout(inner, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all of RAM is here, or the thread of main has ended, for `limit`.
    pub(super) fn wait_ended(&self, limit: Option<Duration>) -> bool {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut inner = self.lock();
        while !inner.ended && !inner.complete {
            inner = match end.map(|end| end.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pongs(values: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    values.iter().for_each(|value| Message::Pong(*value).encode(&mut bytes));
    bytes
}

impl RequestPages for State {
    fn request(&self, run: PageRun) {
        // Held during the write: a request without a name is for the block of the one before it.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = self.lock();
        let Some(block) = inner.blocks.as_ref().and_then(|blocks| blocks.get(run.block)) else { return };
        let page_size = block.page_size().bytes() as u64;
        let new = *last != Some(run.block);
        let message = Message::ReqPages {
            block: new.then(|| block.name().clone()),
            start: run.first.0 * page_size,
            length: u32::try_from(run.count * page_size).unwrap_or(u32::MAX),
        };
        // While the connection is broken, requests wait; all are made again when the source has returned.
        let Some(writer) = inner.writer.clone().filter(|_| inner.answers) else { return };
        drop(inner);
        *last = Some(run.block);
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        if let Err(error) = writer.write_all(&bytes) {
            tracing::debug!(%error, "a request for pages is lost");
        }
    }
}

/// How often a wait looks for a stop that does not wake it.
const TICK: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: a failure between the switch and the confirmation was sent to the source, which took its guest back, and then the
    /// machine was confirmed as well.
    #[test]
    fn a_machine_whose_source_learns_of_a_failure_cannot_be_confirmed() {
        let state = State::default();
        state.lock().phase = Phase::Switched;
        assert!(state.fails());
        assert!(matches!(state.confirm(), Err(Phase::Failed)));
        let ours = State::default();
        ours.lock().phase = Phase::Confirmed;
        assert!(!ours.fails());
        assert!(ours.confirm().is_ok());
    }
}
