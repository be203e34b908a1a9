//! The half of post-copy that does not depend on faults: which page is sent next.
//!
//! ```text
//! requests of the destination ─▶ Schedule::request ─┐
//!                                                   ├─ Schedule::next ─▶ threads that read a page and send it
//! pages worth sending (walk), from the last fault ──┘        │
//!                                                            └─ each page once; requests first
//! ```
//!
//! The guest runs at the destination, and a thread of it waits for each page that is requested. All other pages follow in the
//! background. A connection that breaks loses pages whose delivery is not known: the destination then reports which pages it
//! has, and a new [`Schedule`] is made from that.

#[cfg(shuttle)]
pub mod model;
mod pace;
mod schedule;

pub use crate::ram::{Latencies, PageRun, Shape};
pub use pace::Cost;
pub use schedule::{Job, Lane, RefusedRequest, Schedule};
