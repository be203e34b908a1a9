//! The synchronisation types of the threads: the standard library's, or those of a model checker.
//!
//! The package `guest-ram-models` compiles the same sources with `cfg(shuttle)`; see `docs/develop/concurrency.md`. Types that
//! order nothing, such as counters, are the standard library's there, too.

#[cfg(shuttle)]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, RwLock},
    thread::yield_now,
};
#[cfg(not(shuttle))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, RwLock},
    thread::yield_now,
};
