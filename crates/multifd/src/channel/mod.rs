//! Connections: how they are addressed, opened, accepted, used and stopped.
//!
//! ```text
//! Address ── Connect ──▶ Link ═══════════ Link ◀── Listen ── Listener
//!                          │                │
//!                        waker ◀── Stop ──▶ waker        (one Stop a side)
//! ```
//!
//! A [`Link`] has one owner. Its calls block, and other threads end them through its waker. Sockets and in-memory pipes
//! are links. An embedder can implement it for any other byte stream.

mod address;
mod alive;
mod backlog;
mod callback_watch;
mod callbacks;
mod check;
mod clock;
mod close_watch;
mod closed_channels;
mod completions;
mod connect;
mod context;
mod descriptors;
mod event_fd;
mod exec;
mod exit_status;
pub mod hand_over;
mod host;
mod link;
mod listen;
pub mod memory;
#[cfg(shuttle)]
pub mod model;
mod notice;
mod shut;
mod socket;
mod socket_option;
mod stall_timer;
mod stop;
mod stream;
mod tcp_info;
#[cfg(feature = "tls")]
pub mod tls;
mod unix_socket;

pub use address::{Address, TcpOptions};
pub(crate) use alive::is_of_a_host;
pub use callback_watch::CallbackWatch;
pub use callbacks::Callbacks;
pub(crate) use clock::deadline;
pub use close_watch::{CloseWatch, PeerSignal};
pub(crate) use closed_channels::{ClosedChannels, WatchedChannel, WatchedChannels};
pub use context::Context;
pub(crate) use descriptors::are_none_left;
pub use exit_status::ExitStatusUnknown;
pub use host::Host;
pub use link::{Connect, Link, Listen, ZeroCopy};
pub(crate) use link::{recv_at_least, send_all, send_all_more};
pub use listen::Listener;
pub use socket::SocketLink;
pub use stall_timer::StallTimer;
pub use stop::{CancelOnDrop, Stop, Wake, Watch};
pub use stream::{SharedWriter, Stream};
