//! The guide: how to add live migration to a virtual machine monitor (VMM).
//!
//! This module contains only documentation. Its examples are compiled and run with the tests. The chapters lead step by
//! step to what `examples/microvm` does, a small VMM on `/dev/kvm`.
//!
//! # What you bring
//!
//! | You have | It becomes | Chapter |
//! | --- | --- | --- |
//! | guest memory | [`RamBlocks`]: named, of one page size, the same names on both sides | [memory] |
//! | something that reports which pages were written | a [`DirtyLog`] | [writes] |
//! | a way to stop and resume the guest | a [`Guest`] | [leaving] |
//! | devices that can save and restore their state | bytes with a name, an instance and a version | [leaving], [arriving] |
//! | connections from one host to the other | an [`Address`], or links of your own | [leaving] |
//!
//! Nothing else is needed: no async runtime, no further thread, no allocator, no signal handler. The calls block until the
//! migration has ended. A [`Stop`](multifd::channel::Stop) cancels it from any thread.
//!
//! # What happens
//!
//! ```text
//! source                                                destination
//! announces its blocks                             ──▶  creates the same blocks, empty
//! sends every page, then those written since, …    ──▶  stores them
//! when the rest fits into the downtime: Guest::stop
//! sends the last pages and the device state        ──▶  restores the devices
//!                                                  ◀──  confirms (SHUT 0), and runs the guest
//! drops the guest
//! ```
//!
//! Until the destination has confirmed, the guest belongs to the source: after any failure it continues there. [failing]
//! says what to do in each state.
//!
//! # In which order to write it
//!
//! 1. [memory]: make the blocks, on both sides.
//! 2. [writes]: choose the logs. Every writer needs a log; a missing one corrupts the guest without an error.
//! 3. [leaving]: the source, 30 lines.
//! 4. [arriving]: the destination, 40 lines.
//! 5. [failing]: break it in each state, and check that the guest is on the expected side.
//!
//! [hand_over] moves a machine to another process of the same host without copying its memory.
//! [snapshots] saves a machine to a file instead, and restores it. With the feature `fault`, the chapter `lazy` runs a machine out of
//! a file before its memory is there, the chapter `moment` saves a machine as it is at one moment, and the chapter `early` moves a
//! guest before its memory, when passes do not end.
//!
//! Then read `examples/microvm`: the same with a vCPU, a device and a control socket.
//!
//! | File | What it shows |
//! | --- | --- |
//! | `machine.rs` | memory, stopping a vCPU with complete state, registers as device bytes |
//! | `source.rs` | [leaving], with the logs of KVM and `vm-memory` |
//! | `destination.rs` | [arriving] |
//! | `early.rs` | the chapter `early` |
//! | `local.rs` | [hand_over] |
//! | `snapshot.rs` | [snapshots], and the chapters `lazy` and `moment` |
//! | `control.rs`, `main.rs` | commands over a socket: migrate, cancel, query |
//!
//! # QEMU at the other end
//!
//! A machine of your own type cannot migrate to or from a QEMU: both ends compare the name of the machine type, and QEMU
//! does not have yours. A QEMU accepts only a machine whose type, blocks and devices are QEMU's. The program `multifd` moves
//! such machines to and from files, with [`MainStream::of_capture`](crate::outgoing::MainStream::of_capture).
//!
//! [`RamBlocks`]: multifd::ram::RamBlocks
//! [`DirtyLog`]: multifd::ram::DirtyLog
//! [`Guest`]: multifd::live::Guest
//! [`Address`]: multifd::channel::Address

pub mod arriving;
#[cfg(feature = "fault")]
pub mod early;
pub mod failing;
pub mod hand_over;
#[cfg(feature = "fault")]
pub mod lazy;
pub mod leaving;
pub mod memory;
#[cfg(feature = "fault")]
pub mod moment;
pub mod snapshots;
pub mod writes;
