//! What to do in each state.
//!
//! The rule: **the guest is the destination's from the moment its [`confirm`](crate::arrival::Pending::confirm) returns `Ok`;
//! until then it is the source's.** Whatever ends a migration before leaves the guest at the source, as it was, with nothing
//! to clean up but your own. The source knows it by what [`run`](crate::source::Source::migrate) returns: `Ok`, the
//! destination has the guest; an error, the guest is here; and one error,
//! [`OwnerUnknown`](multifd::Error::OwnerUnknown), nobody can know.
//!
//! # At the source
//!
//! | [`Status`](multifd::live::Status) | The guest | If it ends here | Do |
//! | --- | --- | --- | --- |
//! | `none`, `setup` | runs | nothing has moved | try again when the cause is gone |
//! | `active` | runs | RAM has moved in part, to nowhere | try again. If it never ends, its [`stall`] tells what would help |
//! | `pre-switchover` | stands | as `device` | [`proceed`](multifd::live::Control::proceed), or cancel |
//! | `device` | stands | if everything has been sent, the destination is asked; else, and if it has not got the guest, [`Guest::resume`](multifd::live::Guest::resume) is called before `run` returns | try again |
//! | `cancelling` | stands or runs | its end is `cancelled` | nothing |
//! | `failed`, `cancelled` | as it was before | | report the error; a new [`Stop`](multifd::channel::Stop) for the next try |
//! | `failed` with [`OwnerUnknown`](multifd::Error::OwnerUnknown) | **stands** | | find out whether it runs at the destination: then drop it here, else let it run |
//! | `completed` | stands, for ever | | drop the machine. Never let it run: it runs at the destination |
//!
//! # At the destination
//!
//! | Where | If it ends here | Do |
//! | --- | --- | --- |
//! | [`load`](crate::arrival::Arrival::load) fails | the source has been told | drop everything |
//! | your own restoring fails | [`refuse`](crate::arrival::Pending::refuse), or a drop: the source is told | drop everything |
//! | `confirm` fails | the source has taken its guest back, or could not be told | the same, and **do not run the guest** |
//! | `confirm` is well | the guest is yours | run it if it ran, whatever the channels say |
//!
//! # The one moment that no protocol can close
//!
//! The destination's word may get lost when its host or the network dies in that instant. The source then cannot know:
//! `run` returns [`OwnerUnknown`](multifd::Error::OwnerUnknown), and the guest stays stopped there, so that it does not run
//! twice. It may run nowhere, if the destination has died. That is for you to find out, or for the management that sees both
//! hosts; [`resume_if_unknown`](multifd::live::MigrateOptions::resume_if_unknown) is for those who would rather have it run
//! twice than not at all. *Who owns the guest*, in `docs/`, has every case.
//!
//! # Seen from outside
//!
//! This source meets a destination that cannot restore the device, is cancelled, and comes through at the third try;
//! the guest has not missed a number.
//!
//! ```standalone_crate
//! # mod machine { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/machine.rs")); }
//! # mod leave { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/leave.rs")); }
//! # mod arrive { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/code/arrive.rs")); }
//! # use std::{sync::Arc, thread};
//! # use arrive::arrive; use leave::leave; use machine::Machine;
//! # use multifd::{Error, channel::{Listener, Stop}, ram::*};
//! # fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! # let memory = Memory::Mapped(Mapping::anonymous(1 << 20)?);
//! # let block = RamBlock::new(BlockName::new("ram").ok_or("a name")?, 1 << 20, PageSize::KIB_4, memory)?;
//! # let mut machine = Machine::new(Arc::new(RamBlocks::new(vec![block])?), 0);
//! machine.run();
//!
//! // The destination knows another version of the device, and says so before it has the guest.
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let address = listener.local_address().clone();
//! let destination = thread::spawn(move || arrive(listener, &Stop::new(), 2));
//! let failed = leave(&mut machine, &address, &Stop::new()).expect_err("refused");
//! assert!(destination.join().expect("no panic").is_err() && !failed.is_cancelled());
//! assert!(machine.is_running());
//!
//! // Somebody cancels: from any thread, at any time; here before it has begun.
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let (address, stop) = (listener.local_address().clone(), Stop::new());
//! stop.cancel();
//! assert!(leave(&mut machine, &address, &stop).is_err());
//! assert!(matches!(stop.error(), Some(Error::Cancelled)) && machine.is_running());
//! drop(listener);
//!
//! // A new stop for a new try.
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let address = listener.local_address().clone();
//! let destination = thread::spawn(move || arrive(listener, &Stop::new(), 1));
//! leave(&mut machine, &address, &Stop::new())?;
//! let mut arrived = destination.join().expect("no panic")?;
//! arrived.halt();
//! assert!(!machine.is_running() && arrived.is_whole() && arrived.count >= machine.count);
//! # Ok(())
//! # }
//! ```
//!
//! # Silence
//!
//! A peer that is there and does nothing is given up: `stall_timeout` on both sides (120 s),
//! [`MainStream::end_timeout`](crate::outgoing::MainStream::end_timeout) for the word at the end (600 s). A slow one
//! is waited for. Between two passes a source may be silent for as long as it likes; `Stop::cancel` ends that, too.
//!
//! # Errors
//!
//! The first error is the one reported, on each side; those that it causes elsewhere go to the log
//! ([`tracing`](https://docs.rs/tracing)). Its text says what was expected and what was met, with channel, block and
//! offset where there are; `source()` has the cause. What to do is told by the kind: see [`multifd::error`] and
//! [`crate::error`].
//!
//! [`stall`]: multifd::live::MigrationInfo::stall
