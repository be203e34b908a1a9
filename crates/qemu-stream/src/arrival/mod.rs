//! Receives a machine: from a listener to a guest that may run. Each step is a type.
//!
//! ```text
//! Listening ─ accept ─▶ Arrival ─ announced ─▶ Announced ─ load(blocks) ─▶ Pending ─ confirm ─▶ Confirmed
//!                       a source               configuration             RAM and devices      the guest
//!                       is here                and block list            are here             is ours
//! ```
//!
//! After any failure before [`Pending::confirm`] has returned (an error, a panic, a drop), the source keeps the guest
//! and is informed. After it the guest is only ours.

#[cfg(feature = "fault")]
mod early;
mod options;
mod pending;
mod progress;

#[cfg(feature = "fault")]
pub use self::early::{Early, EarlyOptions, Finished, Landing, Running};
pub use self::{
    options::ArrivalOptions,
    pending::{Confirmed, Pending},
    progress::ArrivalProgress,
};

use std::time::Duration;

use multifd::{
    Callback, Error, Fault, Receiver, RecvCounters, Result,
    channel::{CallbackWatch, Listen, Stop, Stream},
    error::{Usage, chain},
    ram::RamBlocks,
};

use crate::{
    error::Error as StreamError,
    format::{BlockList, Configuration},
    incoming::{CHANNELS_END, Incoming, Loader, LoaderState, MainCounts},
};

/// A destination that listens; no source has connected yet.
pub struct Listening {
    receiver: Receiver,
    options: ArrivalOptions,
    state: LoaderState,
}

impl std::fmt::Debug for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listening").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Listening {
    /// The numbers of the arrival that follows, for another thread to read while this one waits.
    pub fn progress(&self) -> ArrivalProgress {
        ArrivalProgress { channels: self.receiver.counters(), main: self.state.counts().clone() }
    }

    /// Waits for a source, by default without limit: a destination may wait for days. Limits are
    /// [`ReceiveOptions::accept_timeout`] and [`ReceiveOptions::max_refused`].
    ///
    /// # Errors
    /// If it is stopped, if the listener fails, or if a limit is reached.
    ///
    /// [`ReceiveOptions::accept_timeout`]: multifd::ReceiveOptions::accept_timeout
    /// [`ReceiveOptions::max_refused`]: multifd::ReceiveOptions::max_refused
    pub fn accept(self) -> Result<Arrival> {
        let Self { receiver, options, state } = self;
        let main = receiver.wait_main()?;
        let peer = main.peer();
        #[cfg(feature = "fault")]
        let (main, early) = match options.early {
            true => {
                let shared = main
                    .share()
                    .map_err(|error| receiver.stop().fail(Error::io("receive by post-copy", error)));
                let (main, writer) = shared?;
                let field = early::Field::new();
                field.connected(writer);
                (main, Some(field))
            }
            false => (main, None),
        };
        let incoming = Incoming::new(main)
            .stopping(receiver.stop())
            .counted(state.counts().clone())
            .stall_timeout(options.stall_timeout)
            .pause_timeout(options.pause_timeout)
            .silence(options.silence)
            .switchover_ack(options.switchover_ack)
            .send_reason(options.send_reason)
            .postcopy(options.postcopy)
            .channels_may_break(options.channels_may_break)
            .before_refusal(options.before_refusal)
            .suppress_vmdesc(options.suppress_vmdesc);
        #[cfg(feature = "fault")]
        let incoming = match &early {
            Some(field) => incoming.run_early(field.clone()),
            None => incoming,
        };
        Ok(Arrival {
            incoming,
            receiver,
            state,
            peer,
            callback_timeout: options.stall_timeout,
            #[cfg(feature = "fault")]
            early,
        })
    }
}

/// A source has connected; nothing was read from it yet.
pub struct Arrival {
    // The order of the fields matters: the source is informed of the failure before its connections end.
    incoming: Incoming<Stream>,
    receiver: Receiver,
    state: LoaderState,
    peer: String,
    callback_timeout: Option<Duration>,
    #[cfg(feature = "fault")]
    early: Option<std::sync::Arc<early::Field>>,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival")
            .field("peer", &self.peer)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Arrival {
    /// Listens for connections on `listener`. `stop` ends the wait for a source, and everything after it.
    ///
    /// # Errors
    /// If `listener` accepts only one connection and channels are expected; if the system cannot start a thread.
    pub fn listen(
        listener: impl Listen + 'static,
        options: ArrivalOptions,
        stop: &Stop,
    ) -> Result<Listening> {
        let receive = options.receive.clone().stall_timeout(options.stall_timeout);
        let mut receiver = Receiver::new(receive, stop.clone());
        receiver.listen(Box::new(listener))?;
        let state = LoaderState::new(options.expected.clone())
            .left_out(options.left_out)
            .without_switchover_ack(!options.switchover_ack);
        Ok(Listening { receiver, options, state })
    }

    /// The source, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The counters of the channels, for another thread to read.
    pub fn counters(&self) -> RecvCounters {
        self.receiver.counters()
    }

    /// The numbers of this arrival, for another thread to read.
    pub fn progress(&self) -> ArrivalProgress {
        ArrivalProgress { channels: self.receiver.counters(), main: self.state.counts().clone() }
    }

    /// Waits until the source has announced its configuration and its block list.
    ///
    /// # Errors
    /// The first error of the source or its connection; a machine that is not
    /// [`Expected`](crate::incoming::Expected). The source was informed, and its guest continues there.
    pub fn announced(self) -> Result<Announced> {
        #[cfg(feature = "fault")]
        let early = self.early;
        let Self { mut incoming, receiver, state, peer, .. } = self;
        let make = |_: Option<&Configuration>, _: &BlockList| Err(Usage::TooEarly("the blocks").into());
        let mut loader = Loader::resumed(&receiver, state, make);
        let announced = incoming.announced(&mut loader).map(|(_, list)| list.clone());
        let state = loader.into_state();
        match announced {
            Ok(list) => Ok(Announced {
                incoming,
                receiver,
                state,
                peer,
                list,
                #[cfg(feature = "fault")]
                early,
            }),
            Err(error) => Err(failed(incoming, &receiver, error.while_doing(RECEIVING))),
        }
    }

    /// Does [`announced`](Self::announced) and [`Announced::load`] in one call: `make` returns the machine's blocks, or
    /// refuses the machine. If `make` does not return within the [stall timeout](ArrivalOptions::stall_timeout), the migration
    /// fails with an error that says so, as soon as `make` returns. If it panics, the source is informed.
    ///
    /// # Errors
    /// As these; and that of `make`.
    pub fn load(
        self,
        make: impl FnOnce(Option<&Configuration>, &BlockList) -> Result<RamBlocks>,
    ) -> Result<Pending> {
        let limit = self.callback_timeout;
        let announced = self.announced()?;
        let stop = announced.receiver.stop().clone();
        let watch = match CallbackWatch::start(&stop, limit) {
            Ok(watch) => watch,
            Err(error) => return Err(announced.refuse(error)),
        };
        let make = || make(announced.configuration(), announced.list());
        let made = stop.callbacks().call(Callback::MakeBlocks, make);
        drop(watch);
        match stop.check().and(made) {
            Ok(blocks) => announced.load(blocks),
            Err(error) => Err(announced.refuse(error)),
        }
    }
}

/// The source has announced the machine. It waits, and its guest runs there. When dropped, it informs the source to keep
/// the guest.
#[must_use = "if it is dropped, the guest stays at the source"]
pub struct Announced {
    // The order of the fields matters: the source is informed of the failure before its connections end.
    incoming: Incoming<Stream>,
    receiver: Receiver,
    state: LoaderState,
    peer: String,
    list: BlockList,
    #[cfg(feature = "fault")]
    early: Option<std::sync::Arc<early::Field>>,
}

impl std::fmt::Debug for Announced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Announced")
            .field("peer", &self.peer)
            .field("configuration", &self.configuration())
            .field("list", &self.list)
            .finish_non_exhaustive()
    }
}

impl Announced {
    /// The machine's configuration. `None` for QEMU's machine types up to 2.3, which do not send it.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.state.configuration()
    }

    /// The names and lengths of the machine's blocks.
    pub fn list(&self) -> &BlockList {
        &self.list
    }

    /// Receives RAM and devices. The machine's blocks are matched with the announced ones by name; each must have the
    /// announced length.
    ///
    /// # Errors
    /// The first error: of the source, of a connection, of blocks that do not match, or of incomplete RAM. The source
    /// was informed, and its guest continues there.
    pub fn load(self, blocks: RamBlocks) -> Result<Pending> {
        #[cfg(feature = "fault")]
        if self.early.is_some() {
            let why = "ArrivalOptions::run_early is on: load the machine with Announced::load_early";
            return Err(self.refuse(Error::text(why)));
        }
        self.load_whole(blocks).map(|(pending, _)| pending)
    }

    fn load_whole(self, blocks: RamBlocks) -> Result<(Pending, LoaderState)> {
        #[cfg(feature = "fault")]
        let early = self.early;
        #[cfg_attr(
            not(feature = "fault"),
            expect(unused_mut, reason = "only a machine that runs early changes it")
        )]
        let Self { mut incoming, receiver, mut state, .. } = self;
        let counts = state.counts().clone();
        #[cfg(feature = "fault")]
        if let Some(early) = &early {
            state.set_early(early.clone());
        }
        let mut made = Some(blocks);
        let make =
            |_: Option<&Configuration>, _: &BlockList| made.take().ok_or_else(|| Usage::UsedTwice.into());
        let loaded = {
            let mut loader = Loader::resumed(&receiver, state, make);
            let limit = incoming.pause_limit();
            let again = |error| {
                #[cfg(feature = "fault")]
                if let Some(early) = &early {
                    return early.again(error, limit, |limit| receiver.wait_resumed(limit));
                }
                wait_resumed(&receiver, &counts, limit, error)
            };
            let read = incoming.run_resumable(&mut loader, again);
            #[cfg(feature = "fault")]
            let switched = if early.is_some() { RECEIVING_REST } else { RECEIVING_STOPPED };
            #[cfg(not(feature = "fault"))]
            let switched = RECEIVING_STOPPED;
            let doing = if incoming.has_switched() { switched } else { RECEIVING };
            read.map_err(|error| error.while_doing(doing)).and_then(|loaded| {
                let main_pages = loader.main_pages();
                let blocks = loader.complete(&loaded)?;
                Ok((loaded, blocks, main_pages, loader.into_state()))
            })
        };
        match loaded {
            Ok((loaded, blocks, main_pages, state)) => {
                Ok((Pending { incoming, receiver, loaded, blocks, main_pages }, state))
            }
            Err(error) => Err(failed(incoming, &receiver, error)),
        }
    }

    /// Informs the source that its guest continues there, because of `error`. A source of this library
    /// [reports](ArrivalOptions::send_reason) its text. Returns `error`.
    pub fn refuse(self, error: Error) -> Error {
        let Self { incoming, receiver, .. } = self;
        failed(incoming, &receiver, error)
    }
}

/// Waits until a source that has switched to post-copy returns, because `error` has broken its connection.
fn wait_resumed(
    receiver: &Receiver,
    counts: &MainCounts,
    limit: Option<Duration>,
    error: StreamError,
) -> Result<Stream, StreamError> {
    tracing::warn!("{INTERRUPTED}: {}", chain(&error));
    counts.set_paused(true);
    let resumed = receiver.wait_resumed(limit);
    counts.set_paused(false);
    // Why the wait has ended is known to the stop, unless the source was too late.
    resumed.map_err(|_| error)
}

/// Ends an arrival before everything has arrived. Returns the error that the migration failed with.
fn failed(mut incoming: Incoming<Stream>, receiver: &Receiver, error: Error) -> Error {
    // If a channel has failed before, main has only noticed that.
    incoming.set_reason(receiver.stop().error().as_ref().unwrap_or(&error));
    // Dropped first, because a stop shuts connections down.
    drop(incoming);
    match error.fault() {
        Fault::Connection => receiver.fail_with_source(error, CHANNELS_END),
        _ => receiver.stop().fail(error),
    }
}

const INTERRUPTED: &str = "the connection to the source is broken after its switch to post-copy; its guest is stopped there and is not \
                           lost: waiting for that QEMU to resume the migration to this address (migrate -r)";
const RECEIVING: &str = "cannot receive the guest";
#[cfg(feature = "fault")]
const RECEIVING_REST: &str = "cannot receive the rest of the guest after its switch to post-copy";
const RECEIVING_STOPPED: &str = "cannot receive the rest of the guest after its switch to post-copy (the guest may stay stopped at the source: \
                                 check query-status there, and do not end that process)";
