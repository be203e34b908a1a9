//! The synchronisation types of the threads: locks, conditions, flags, the clock, and the threads themselves.
//!
//! They are the standard library's. The package `multifd-models` compiles the same sources with `cfg(shuttle)`. Then
//! they are those of a model checker, which chooses the next thread at each of them; see `docs/develop/concurrency.md`.
//! Types that order nothing, such as counters, are the standard library's there, too.

#[cfg(shuttle)]
pub(crate) mod model;

#[cfg(shuttle)]
pub(crate) use model::{
    AtomicBool, AtomicU64, Builder, Condvar, Instant, JoinHandle, Mutex, MutexGuard, OnceLock, panicking,
};
#[cfg(not(shuttle))]
pub(crate) use std::{
    sync::{
        Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64},
    },
    thread::{Builder, JoinHandle, panicking},
    time::Instant,
};
