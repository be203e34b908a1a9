//! Which directions are open, and whether the run has ended.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use multifd::channel::Wake;

/// What is open.
pub(super) struct Live {
    state: Mutex<State>,
    /// Ends the wait for connections.
    listener: Arc<dyn Wake>,
}

#[derive(Default)]
struct State {
    open: usize,
    /// A connection has carried data.
    carried: bool,
    interrupted: bool,
    no_more: bool,
}

/// A direction that is open, until it is dropped.
pub(super) struct Life {
    live: Arc<Live>,
    carried: AtomicBool,
}

impl Live {
    pub(super) fn new(listener: Arc<dyn Wake>) -> Self {
        Self { state: Mutex::default(), listener }
    }

    /// Opens a direction.
    pub(super) fn begin(self: &Arc<Self>) -> Life {
        self.lock().open += 1;
        Life { live: self.clone(), carried: AtomicBool::new(false) }
    }

    /// The number of open directions.
    pub(super) fn open(&self) -> usize {
        self.lock().open
    }

    /// Whether nothing is open any more, and the run is to end.
    pub(super) fn has_ended(&self) -> bool {
        let state = self.lock();
        state.no_more || (state.open == 0 && (state.carried || state.interrupted))
    }

    /// Notes an interrupt; returns the number of connections that are open.
    pub(super) fn interrupt(&self) -> usize {
        let mut state = self.lock();
        state.interrupted = true;
        let open = state.open.div_ceil(2);
        drop(state);
        self.listener.wake();
        open
    }

    /// A connection could not be passed on: its source has failed, so nothing more comes if nothing is open.
    pub(super) fn failed(&self) {
        self.lock().carried = true;
    }

    /// No connection can be accepted any more.
    pub(super) fn no_more(&self) {
        self.lock().no_more = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Life {
    /// Bytes have passed.
    pub(super) fn carried(&self) {
        // Relaxed: only this thread uses it.
        self.carried.store(true, Ordering::Relaxed);
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let mut state = self.live.lock();
        state.open -= 1;
        state.carried |= self.carried.load(Ordering::Relaxed);
        let last = state.open == 0;
        drop(state);
        if last {
            self.live.listener.wake();
        }
    }
}
