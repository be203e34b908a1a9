//! A guest with one vCPU, a thread that writes whole pages at random places, at a rate.

use std::{
    fmt, io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use multifd::{
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{PageIndex, RamBlocks},
};

use super::memory::block;
use crate::Result;

/// What a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    Idle,
    /// This many MB per second, all over its memory.
    Rate(u64),
    /// As fast as it can, within this many MiB.
    Within(u64),
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("idle"),
            Self::Rate(rate) => write!(f, "writes {rate} MB/s all over its memory"),
            Self::Within(size) => write!(f, "writes as fast as it can within {size} MiB"),
        }
    }
}

impl Load {
    /// Pages in each millisecond, and the pages to choose from.
    fn pages(self, all: u64) -> (u64, u64) {
        match self {
            Self::Idle => (0, all),
            Self::Rate(rate) => ((rate * 1000).div_ceil(4096), all),
            Self::Within(size) => (u64::MAX, (size << 8).min(all)),
        }
    }
}

/// The guest. Its drop ends the thread.
pub(super) struct Writing {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The thread looks at the state before its next page.
    is_called: AtomicBool,
    written: AtomicU64,
}

#[derive(Default)]
struct State {
    is_stopped: bool,
    is_ended: bool,
    stands: bool,
}

impl Writing {
    pub(super) fn start(blocks: &Arc<RamBlocks>, load: Load) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            is_called: AtomicBool::new(false),
            written: AtomicU64::new(0),
        });
        let thread = match load {
            Load::Idle => None,
            load => {
                let (blocks, shared) = (blocks.clone(), shared.clone());
                Some(Builder::new().name("vcpu_0".into()).spawn(move || shared.write(&blocks, load))?)
            }
        };
        Ok(Self { shared, thread })
    }

    /// The number of pages that were written so far.
    pub(super) fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    fn call(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.shared.lock();
        change(&mut state);
        self.shared.is_called.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, blocks: &RamBlocks, load: Load) {
        let block = block(blocks);
        let (each, pages) = load.pages(block.pages());
        let mut random = fastrand::Rng::with_seed(7);
        let mut bytes = [0_u8; 4096];
        let (mut begun, mut done) = (Instant::now(), 0);
        loop {
            // A guest that is late writes less: it does not catch up.
            if done >= each {
                let rest = TICK.saturating_sub(begun.elapsed());
                let state = self.lock();
                let calm = |_: &mut State| !self.is_called.load(Ordering::Relaxed);
                drop(self.changed.wait_timeout_while(state, rest, calm));
                (begun, done) = (Instant::now(), 0);
            }
            if self.is_called.load(Ordering::Relaxed) {
                let mut state = self.lock();
                self.is_called.store(false, Ordering::Relaxed);
                while state.is_stopped && !state.is_ended {
                    state.stands = true;
                    self.changed.notify_all();
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.stands = false;
                if state.is_ended {
                    return;
                }
            }
            let page = random.u64(..pages);
            bytes[..8].copy_from_slice(&(page ^ done.wrapping_add(1)).to_be_bytes());
            if block.store(PageIndex(page), &bytes).is_err() {
                return;
            }
            done += 1;
            self.written.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Guest for Writing {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DeviceName::from_static("vcpu"), 8)]
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.call(|state| state.is_stopped = true);
        if self.thread.is_some() {
            let state = self.shared.changed.wait_while(self.shared.lock(), |state| !state.stands);
            drop(state.unwrap_or_else(PoisonError::into_inner));
        }
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let name = DeviceName::from_static("vcpu");
        Ok(vec![DeviceSection { name, instance_id: 0, version: 1, data: vec![7; 8] }])
    }
    fn resume(&mut self) {
        self.call(|state| state.is_stopped = false);
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.call(|state| state.is_ended = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const TICK: Duration = Duration::from_millis(1);
