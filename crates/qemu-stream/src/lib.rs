//! Reads and writes the parts of a QEMU migration other than RAM: the main stream, the device sections as opaque bytes,
//! the device description at the end, the mapped-ram file.
//!
//! ```text
//!             outgoing                                           incoming
//! engine ─▶ MainStream ─▶ Outgoing ══ main connection ══▶ Incoming ─▶ Loader ─▶ engine
//!                            │  ▲                           │
//!                            │  └─────── return path ───────┤
//!                            └──────── format ──────────────┘
//!                                         │
//!                     MappedRamFile ── mapped_ram ── Layout
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | [`mod@format`] | parsing and writing of bytes, with bounds, without sockets |
//! | [`arrival`], [`source`] | receiving and sending a machine, each in a few calls: start here |
//! | [`incoming`] | the main stream at a destination; calls a [`Destination`](incoming::Destination), or is read [event by event](incoming::Events) |
//! | [`outgoing`] | the main stream at a source, call by call, or [event by event](outgoing::EventWriter) |
//! | [`mapped_ram`] | the file that QEMU 9.0 and later save to and load from |
//! | [`physical`] | memory by guest-physical addresses |
//! | [`recording`] | migrations that were recorded between source and destination |
//! | [`state`] | the state of devices as fields with names |
//! | [`stored`] | machines in other forms: streams in files, save images of libvirt |
//! | [`error`] | errors, sorted by who is at fault |
//! | [`guide`] | how to add live migration to a virtual machine monitor |
//!
//! The engine, `multifd`, transfers RAM. Device state is transferred and never interpreted. The format is described in
//! `docs/develop/stream-format.md`.
//!
//! # Example: a machine of your own, from source to destination
//!
//! ```
//! use std::{convert::Infallible, os::unix::net::UnixStream, thread, time::Duration};
//!
//! use multifd::{
//!     channel::Stop,
//!     live::Verdict,
//!     ram::{BlockIndex, BlockName, PageIndex, PageSize},
//! };
//! use qemu_stream::{format::*, incoming::*, outgoing::*};
//!
//! /// Prints what it receives.
//! struct Printer;
//!
//! impl Destination for Printer {
//!     type Error = Infallible;
//!     fn blocks(&mut self, list: &BlockList) -> Result<(), Infallible> {
//!         println!("{} bytes of RAM", list.total());
//!         Ok(())
//!     }
//!     fn sync(&mut self) -> Result<(), Infallible> { Ok(()) }
//!     fn zero_page(&mut self, _: BlockIndex, _: PageIndex) -> Result<(), Infallible> { Ok(()) }
//!     fn page(&mut self, _: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<(), Infallible> {
//!         println!("page {page}: {:?}…", &bytes[..2]);
//!         Ok(())
//!     }
//!     fn read_page(&mut self, _: BlockIndex, _: PageIndex, _: &mut [u8]) -> Result<(), Infallible> { Ok(()) }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (source, destination) = UnixStream::pair()?;
//! let sent = thread::spawn(move || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//!     let machine = MachineType::new("my-vmm-1")?;
//!     // No channels here: pages go over main.
//!     let mut out = Outgoing::new(source, Options::new(Configuration::new(machine)).sync_mode(None))?;
//!     let ram = BlockEntry::new(BlockName::new("ram0").ok_or("a name")?, 1 << 20);
//!     out.begin(0)?;
//!     out.setup(BlockList::new(vec![ram], PageSize::KIB_4)?, None)?;
//!     out.switchover()?;
//!     out.begin_end()?;
//!     out.page(BlockIndex(0), PageIndex(7), &[42; 4096])?;
//!     out.end_part(None)?;
//!     let vcpu = Device { name: SectionName::new("vcpu").ok_or("a name")?, instance: 0, version: 1, state: vec![1] };
//!     out.devices(&DevicePart::build(&[vcpu], 4096, SectionId(2))?)?;
//!     match out.complete(&Stop::new(), None, Duration::from_secs(10)) {
//!         Verdict::Taken => Ok(()), // the destination has the guest
//!         Verdict::Refused(error) | Verdict::Unknown(error) => Err(error.into()),
//!     }
//! });
//!
//! let mut incoming = Incoming::new(destination);
//! let loaded = incoming.run(&mut Printer)?;
//! assert_eq!(loaded.devices.sections()[0].name.to_string(), "vcpu");
//! incoming.finish(Outcome::Loaded)?; // from here on the destination owns the guest
//! sent.join().expect("no panic").expect("sent");
//! # Ok(())
//! # }
//! ```

pub mod arrival;
mod connection;
mod embedder;
pub mod error;
pub mod format;
pub mod guide;
pub mod incoming;
pub mod mapped_ram;
pub mod outgoing;
pub mod physical;
pub mod recording;
mod refuse;
pub mod source;
pub mod state;
pub mod stored;

pub use connection::{Connection, Judge};
pub use error::Error;
