//! **multifd** transfers the RAM of a running virtual machine over many channels at once, in the wire format of QEMU's
//! multifd.
//!
//! ```text
//!  source                                                          destination
//!  guest RAM → DirtyLog → batch → channel thread → Link ═══════ Link → channel thread → guest RAM
//!                │  pass   (one block, up to 512 KiB)                packet checked, pages placed │
//!  Main ─────────┴── setup · passes · flush · switchover · devices · end ── Receiver::sync ───────┘
//! ```
//!
//! A *pass* sends every dirty page once. After each pass there is a *flush*: each channel sends a SYNC packet, and the
//! destination continues only when all channels have reached theirs. So an older version of a page never overwrites a newer
//! one. This is the only ordering rule; everything else runs in parallel.
//!
//! | module | what it contains |
//! | --- | --- |
//! | [`ram`] | the crate `guest-ram`: blocks, dirty bits, guest memory, which is never a Rust reference |
//! | [`wire`] | packets as bytes |
//! | [`channel`] | addresses, links, the one [`Stop`](channel::Stop) |
//! | [`Sender`], [`Receiver`] | the two ends of the channels |
//! | [`live`] | passes, switchover, states |
//! | [`parameters`] | the ranges and defaults of the options |
//!
//! This crate does not write the main stream. `qemu-stream` does, or your own implementation of [`live::Main`].
//!
//! # The channels alone
//!
//! ```
//! use std::{sync::Arc, thread};
//!
//! use multifd::{ChannelCount, ReceiveOptions, Receiver, SendOptions, Sender};
//! use multifd::{channel::{Stop, memory}, ram::*};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let blocks = || -> Result<_, Box<dyn std::error::Error>> {
//!     let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//!     let name = BlockName::new("pc.ram").ok_or("a name")?;
//!     Ok(Arc::new(RamBlocks::new(vec![RamBlock::new(name, 1 << 20, PageSize::KIB_4, memory)?])?))
//! };
//! let (source, destination) = (blocks()?, blocks()?);
//! let (connector, listener) = memory::network(1 << 16);
//!
//! // Without a main stream the receiver cannot detect the number of channels, so it is set.
//! let options = ReceiveOptions::new().channels(ChannelCount::Exact(4));
//! let mut receiver = Receiver::new(options, Stop::new());
//! receiver.listen(Box::new(listener))?;
//! receiver.set_blocks(destination.clone())?;
//!
//! source.block(BlockIndex(0))?.store(PageIndex(7), &[42; 4096])?;
//! let mut sender = Sender::new(SendOptions::new().channels(4), source, Stop::new())?;
//! sender.set_up(Arc::new(connector))?;
//! sender.queue(BlockIndex(0), PageIndex(7))?;
//! let sent = thread::spawn(move || sender.sync().map(drop).and_then(|()| sender.finish()));
//! receiver.sync()?; // the pages before the sync point are in place
//!
//! let mut page = [0; 4096];
//! destination.block(BlockIndex(0))?.slice(PageIndex(7), 1).ok_or("there")?.copy_to(&mut page);
//! assert_eq!(page, [42; 4096]);
//! receiver.finish()?;
//! sent.join().expect("no panic")?;
//! # Ok(())
//! # }
//! ```

// `multifd-models` shares these sources but does not contain the unit tests.
#![cfg(not(all(shuttle, test)))]

mod batch;
pub mod channel;
mod compress;
pub mod error;
pub mod live;
#[cfg(shuttle)]
pub mod model;
mod options;
mod outcome;
pub mod postcopy;
mod recv;
mod send;
mod sendable;
mod slices;
mod stats;
mod sync_types;
pub mod wire;

pub use compress::{Level, Method};
pub use error::{Callback, Error, Fault, Result};
/// Guest RAM: blocks, memory and files, dirty bits. All of the crate `guest-ram`.
pub use guest_ram as ram;
pub use options::parameters;
pub use options::{ChannelCount, ChannelsFrom, ReceiveOptions, SendOptions};
pub use recv::{Arrived, MayMiss, PlaceLate, Receiver, RecvCounters};
pub use send::{SendCounters, Sender, Synced};
pub use stats::ChannelStats;
