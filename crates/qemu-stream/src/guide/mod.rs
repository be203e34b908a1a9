//! The manual: how a virtual machine monitor comes to migrate its guests.
//!
//! Documentation and nothing else; its examples are compiled and run with the tests. It leads from nothing to what
//! `examples/microvm` does, a monitor of `/dev/kvm` that is there to be read.
//!
//! # What you bring
//!
//! | You have | It becomes | Chapter |
//! | --- | --- | --- |
//! | guest memory | [`RamBlocks`]: named, of one page size, the same names on both sides | [memory] |
//! | something that tells what was written | a [`DirtyLog`] | [writes] |
//! | a way to stop the guest and let it go on | a [`Guest`] | [leaving] |
//! | devices that can save and restore their state | bytes with a name, an instance and a version | [leaving], [arriving] |
//! | connections from one host to the other | an [`Address`], or links of your own | [leaving] |
//!
//! Nothing else: no async runtime, no thread of yours but the one that calls, no allocator, no signal handler. The
//! calls block until the migration has come to its end, and a [`Stop`](multifd::channel::Stop) ends it from any
//! thread.
//!
//! # What happens
//!
//! ```text
//! source                                                destination
//! blocks announced                                 ──▶  makes its own, empty
//! every page, then those written meanwhile, …      ──▶  in place
//! the rest fits into the downtime: Guest::stop
//! the last pages, the devices' bytes               ──▶  restores the devices
//!                                                  ◀──  "it is mine" (SHUT 0), and lets the guest run
//! forgets the guest
//! ```
//!
//! Before the destination's word has come the guest belongs to the source, and whatever goes wrong lets it run on
//! there. [failing] tells what to do in which state.
//!
//! # In which order to write it
//!
//! 1. [memory]: make the blocks, on both sides.
//! 2. [writes]: choose the logs. This is where guests are lost without a word: every writer has to be in one.
//! 3. [leaving]: the source, 30 lines.
//! 4. [arriving]: the destination, 40 lines.
//! 5. [failing]: break it in each state, and look whether the guest is where it should be.
//!
//! A file in the place of the destination, and the way back, is in [snapshots].
//!
//! Then read `examples/microvm`: the same with a vCPU, a device and a control socket.
//!
//! | There | Is |
//! | --- | --- |
//! | `machine.rs` | memory, the vCPU and how it is stopped whole, registers as device bytes |
//! | `source.rs` | what [leaving] shows, with the logs of KVM and `vm-memory` |
//! | `destination.rs` | what [arriving] shows |
//! | `control.rs`, `main.rs` | commands over a socket: migrate, cancel, ask |
//!
//! # QEMU at the other end
//!
//! A machine of your own type talks to itself: the type's name is compared, and QEMU has none of yours. What a QEMU
//! does talk to is a machine whose type, blocks and devices are QEMU's; carrying such a machine from or to a file is
//! what the program `multifd` does, and [`MainStream::of_capture`](crate::outgoing::MainStream::of_capture) is its
//! way.
//!
//! [`RamBlocks`]: multifd::ram::RamBlocks
//! [`DirtyLog`]: multifd::ram::DirtyLog
//! [`Guest`]: multifd::live::Guest
//! [`Address`]: multifd::channel::Address

pub mod arriving;
pub mod failing;
pub mod leaving;
pub mod memory;
pub mod snapshots;
pub mod writes;
