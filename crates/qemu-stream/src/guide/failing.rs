//! What to do in each state.
//!
//! The rule: **the source owns the guest until [`confirm`](crate::arrival::Pending::confirm) returns `Ok` at the destination;
//! after that the destination owns it.** A migration that ends before leaves the guest at the source as it was; you only clean
//! up your own objects. The result of [`migrate`](crate::source::Source::migrate) shows the owner at the source:
//!
//! - `Ok`: the destination has the guest.
//! - an error: the guest is here.
//! - the error [`OwnerUnknown`](multifd::Error::OwnerUnknown): the owner cannot be known.
//!
//! # At the source
//!
//! | [`Status`](multifd::live::Status) | The guest | If the migration ends here | What to do |
//! | --- | --- | --- | --- |
//! | `none`, `setup` | runs | no page was sent | remove the cause and try again |
//! | `active` | runs | a part of RAM was sent; the destination drops it | try again. If the migration never ends, its [`stall`] says what would help |
//! | `pre-switchover` | is stopped | as `device` | [`proceed`](multifd::live::Control::proceed), or cancel |
//! | `device` | is stopped | if everything was sent, the source asks the destination. If the destination does not have the guest, [`Guest::resume`](multifd::live::Guest::resume) is called before `migrate` returns | try again |
//! | `cancelling` | is stopped or runs | the next status is `cancelled` | nothing |
//! | `failed`, `cancelled` | as before the migration | | report the error; use a new [`Stop`](multifd::channel::Stop) for the next attempt |
//! | `failed` with [`OwnerUnknown`](multifd::Error::OwnerUnknown) | **is stopped** | | check whether the guest runs at the destination. If it does, drop it here; otherwise resume it |
//! | `completed` | is stopped permanently | | drop the machine. Never run it: it runs at the destination |
//!
//! # At the destination
//!
//! | Step | If the migration ends here | What to do |
//! | --- | --- | --- |
//! | [`load`](crate::arrival::Arrival::load) fails | the source was informed | drop everything |
//! | your own restore fails | call [`refuse`](crate::arrival::Pending::refuse), or drop it: the source is informed | drop everything |
//! | `confirm` fails | the source keeps its guest, or could not be informed | drop everything, and **do not run the guest** |
//! | `confirm` returns `Ok` | the guest is yours | run it if it ran before, regardless of errors on channels |
//!
//! # When the owner is unknown
//!
//! The confirmation of the destination can get lost if its host or the network fails at that moment. The source cannot know
//! then: `migrate` returns [`OwnerUnknown`](multifd::Error::OwnerUnknown), and the guest stays stopped there, so that it does not
//! run twice. If the destination has failed, the guest runs nowhere. You, or a management layer that sees both hosts, must
//! check. With [`resume_if_unknown`](multifd::live::MigrateOptions::resume_if_unknown) the guest is resumed instead.
//! **Warning:** it may then run twice. The page *Who owns the guest* (`docs/use/owners.md`) lists every case.
//!
//! # When one channel breaks
//!
//! By default the connection of any channel that breaks ends the migration, as in QEMU. With
//! [`SourceOptions::channels_may_break`](crate::source::SourceOptions::channels_may_break) and
//! [`ArrivalOptions::channels_may_break`](crate::arrival::ArrivalOptions::channels_may_break), which both sides need, the others continue:
//!
//! | What breaks | What happens |
//! | --- | --- |
//! | one of several channels, before the guest moves | its pages since the last sync point are sent again; [`lost_channels`](multifd::live::MigrationInfo::lost_channels) names it |
//! | the main connection; the last channel; any channel before RAM begins | the migration fails, and the guest is at the source |
//! | any connection after a switch to post-copy | both sides pause: see the chapter `early` |
//!
//! Each pass then ends with a question to the destination: one round trip more.
//!
//! # Example
//!
//! The first destination cannot restore the device. The second attempt is cancelled. The third one succeeds, and the guest
//! has not missed a number.
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
//! // The destination has another version of the device, and refuses before it owns the guest.
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let address = listener.local_address().clone();
//! let destination = thread::spawn(move || arrive(listener, &Stop::new(), 2));
//! let failed = leave(&mut machine, &address, &Stop::new()).expect_err("refused");
//! assert!(destination.join().expect("no panic").is_err() && !failed.is_cancelled());
//! assert!(machine.is_running());
//!
//! // A cancel is possible from any thread, at any time; here before the migration has started.
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let (address, stop) = (listener.local_address().clone(), Stop::new());
//! stop.cancel();
//! assert!(leave(&mut machine, &address, &stop).is_err());
//! assert!(matches!(stop.error(), Some(Error::Cancelled)) && machine.is_running());
//! drop(listener);
//!
//! // A new attempt needs a new stop.
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
//! # Callbacks that panic or do not return
//!
//! | Where | What happens |
//! | --- | --- |
//! | any method of [`Guest`] or `DirtyLog` panics during `migrate` | the migration fails with [`Panicked`], which names the method; the panic does not leave `migrate`. The guest continues as after any other failure |
//! | [`Guest::stop`] panics | as above; [`Guest::resume`] is called if the guest ran, because it may be stopped |
//! | [`Guest::resume`] panics | [`NotResumed`], with the first error and the panic: the guest is stopped here, and it is yours |
//! | `DirtyLog::put_back` panics | the first error; a warning in the log. Create a new dirty log for the next attempt |
//! | the closure of [`Arrival::load`], or your code before [`confirm`], panics | the panic continues in your thread. The dropped object informs the source, and the guest continues there |
//! | a method, or the closure, does not return | the library cannot interrupt it. [`Progress::callback`] shows it at the source. After the stall timeout the migration fails with [`CallbackHangs`]: the connections are closed at once, the error is in [`Stop::error`], and `migrate` or `load` returns it when the callback has returned |
//!
//! # A cancel, early and late
//!
//! [`Stop::cancel`] is possible at any time, from any thread. Until everything was sent, it takes effect at once. After that it
//! asks the destination. If the destination restores the guest and has not confirmed, it notices the cancel and the guest
//! continues at the source. If it has confirmed, the migration has succeeded: `migrate` returns `Ok`, and the guest must not run at
//! the source. A cancel after `migrate` has returned does nothing.
//!
//! # A guest that was paused before
//!
//! [`Guest::run_state`] reports it. Such a guest is still "stopped" and saved, but never resumed by a failed migration, and the
//! destination does not start it: [`Confirmed::run_state`] is `Paused` there.
//!
//! # Memory that is plugged or unplugged
//!
//! The blocks of a [`Source`] are those of one attempt. During it, the machine must not gain or lose memory: refuse hot-plug
//! between `Source::new` and the end of `migrate`. Between two attempts the memory may change: make new `RamBlocks` and a new
//! dirty log for each attempt. The destination learns the blocks from the list of that attempt.
//!
//! # Async programs
//!
//! `migrate`, `accept`, `load` and `confirm` block: call them in a thread of their own, such as tokio's `spawn_blocking`. If an
//! async task that waits for that thread is aborted, or its handle is dropped, the thread continues: the guest moves although
//! nobody waits for it. A guard in the task cancels the migration in this case:
//!
//! ```
//! # use multifd::{Error, channel::Stop};
//! # async fn spawn_blocking<T>(run: impl FnOnce() -> T) -> T { run() }
//! # async fn example(migrate: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
//! let stop = Stop::new(); // the stop that `Source::new` or `Arrival::listen` got
//! let _guard = stop.cancel_on_drop();
//! spawn_blocking(migrate).await
//! # }
//! ```
//!
//! After the end of the migration, the drop of the guard does nothing. The thread still needs a moment to put the guest back:
//! keep its handle if you need to know when the guest runs again.
//!
//! # Silence
//!
//! If a peer is connected but sends or accepts nothing, the migration fails: after `stall_timeout` on both sides (120 s), and
//! after [`MainStream::end_timeout`](crate::outgoing::MainStream::end_timeout) for the final confirmation (600 s). A slow peer
//! does not trigger these limits. Between two passes a source may be silent without limit; `Stop::cancel` ends that wait.
//!
//! # Errors
//!
//! Each side reports its first error. Later errors that it causes go to the log ([`tracing`](https://docs.rs/tracing)). The text
//! says what was expected and what was found, with channel, block and offset if they are known. `source()` has the cause. The
//! kind of the error shows what to do: see [`multifd::error`] and [`crate::error`].
//!
//! [`Arrival::load`]: crate::arrival::Arrival::load
//! [`CallbackHangs`]: multifd::Error::CallbackHangs
//! [`Confirmed::run_state`]: crate::arrival::Confirmed::run_state
//! [`Guest`]: multifd::live::Guest
//! [`Guest::resume`]: multifd::live::Guest::resume
//! [`Guest::run_state`]: multifd::live::Guest::run_state
//! [`Guest::stop`]: multifd::live::Guest::stop
//! [`NotResumed`]: multifd::Error::NotResumed
//! [`Panicked`]: multifd::Error::Panicked
//! [`Progress::callback`]: multifd::live::Progress::callback
//! [`Source`]: crate::source::Source
//! [`Stop::cancel`]: multifd::channel::Stop::cancel
//! [`Stop::error`]: multifd::channel::Stop::error
//! [`confirm`]: crate::arrival::Pending::confirm
//! [`stall`]: multifd::live::MigrationInfo::stall
