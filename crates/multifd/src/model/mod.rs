//! What the package `multifd-models` runs under a model checker: the engine's own code, under many schedules.
//!
//! See `docs/develop/concurrency.md` for what each model covers, and which errors they were seen to catch.

pub mod loopback;

pub use crate::{
    channel::model as stop,
    live::model as switchover,
    postcopy::model as postcopy,
    recv::model as recv,
    send::model as dispatch,
    sync_types::model::{exhaust, explore},
};
