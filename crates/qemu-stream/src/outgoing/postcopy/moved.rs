//! The source of a guest that has run here: after its passes, the rest of its RAM follows it.
//!
//! ```text
//! Source::run ─ passes ─┬─ Completed
//!                       └─ switch ─ session ─┬─ Completed
//!                                            ├─ Interrupted ─ resume ─ session ─ …
//!                                            └─ the destination does not have the guest: it continues here
//! ```

use std::{
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use multifd::{
    Error, Fault, Result, SendOptions,
    channel::{Connect, Stop, Stream},
    live::{Guest, MigrationInfo, Status, Switched},
    ram::DirtyLog,
};

use super::{
    PostcopyControl, PostcopyInfo, PostcopyOptions, PostcopyProgress, PostcopySource,
    contents::Contents,
    failure::{GuestAt, PostcopyError},
    requests::Requests,
    run::{Begin, Carriers, Switch, run},
    session::Channels,
};
use crate::outgoing::MainStream;

/// How a migration that may switch to post-copy has ended without an error.
#[derive(Debug)]
#[must_use = "an interrupted migration has to be resumed"]
pub enum Moved {
    /// The destination has the guest, and all of its RAM.
    Completed {
        /// The numbers of the passes, and the downtime.
        info: Box<MigrationInfo>,
        /// The numbers since the switch; `None` if it did not switch.
        postcopy: Option<PostcopyInfo>,
    },
    /// The connections have broken after the switch. **The guest must not run here**: it runs at the destination, or waits there for
    /// a page.
    Interrupted(Box<Interrupted>),
}

/// A migration whose connections have broken after the switch to post-copy. This side has the pages that the destination lacks: if
/// it is dropped, the guest is lost.
#[must_use = "the guest at the destination needs the pages of this side"]
pub struct Interrupted {
    source: PostcopySource,
    switched: Switched,
    channels: Option<SendOptions>,
    error: Error,
}

impl fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupted")
            .field("is_confirmed", &self.is_confirmed())
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl Interrupted {
    /// What has interrupted it.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Whether the destination has confirmed that it runs the guest. If not, it may run there, and nothing but the destination can
    /// answer that: [`resume`](Self::resume) asks it.
    pub fn is_confirmed(&self) -> bool {
        self.source.0.is_confirmed
    }

    /// The numbers since the switch, for another thread to read.
    pub fn progress(&self) -> PostcopyProgress {
        self.source.progress()
    }

    /// Changes limits, for another thread.
    pub fn control(&self) -> PostcopyControl {
        self.source.control()
    }

    /// Connects to the destination, which waits, and sends what it lacks. `stop` cancels; the result is then another interrupted
    /// migration.
    ///
    /// # Errors
    /// What the destination has reported, if it does not have the guest and never will: the guest continues here, if it ran, and all
    /// dirty bits are put back.
    pub fn resume(
        self,
        connector: impl Connect + 'static,
        stop: &Stop,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<Moved> {
        self.resume_once(&(Arc::new(connector) as _), stop, log, guest)
    }

    /// Does the same until it succeeds, for `limit` at most, with a pause between two attempts. Errors other than those of connections
    /// end it at once.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    pub fn resume_within(
        self,
        limit: Duration,
        connector: impl Connect + 'static,
        stop: &Stop,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<Moved> {
        let (connector, begun) = (Arc::new(connector) as Arc<dyn Connect>, Instant::now());
        let mut interrupted = self;
        loop {
            let moved = interrupted.resume_once(&connector, stop, log, guest)?;
            let Moved::Interrupted(again) = moved else { return Ok(moved) };
            let may_help = matches!(again.error.fault(), Fault::Connection | Fault::Stalled | Fault::Peer);
            if !may_help || stop.is_stopped() || begun.elapsed() >= limit {
                return Ok(Moved::Interrupted(again));
            }
            thread::sleep(PAUSE.min(limit.saturating_sub(begun.elapsed())));
            interrupted = *again;
        }
    }

    fn resume_once(
        self,
        connector: &Arc<dyn Connect>,
        stop: &Stop,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<Moved> {
        self.switched.becomes(Status::PostcopyRecover)?;
        self.source.0.counts.recovers();
        let channels = self.channels.clone();
        let channels = channels.map(|send| Channels { send, connector: connector.clone() });
        let ran = run(&self.source.0, stop, Begin::Resume(&**connector, channels));
        self.ended(ran, log, guest)
    }

    /// What the end of a session means.
    fn ended(
        mut self,
        ran: Result<(), PostcopyError>,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<Moved> {
        let is_recovering = self.switched.progress().status() == Status::PostcopyRecover;
        match ran {
            Ok(()) => {
                if is_recovering {
                    self.switched.becomes(Status::PostcopyActive)?;
                }
                let postcopy = Some(self.source.progress().info());
                let info = self.switched.completed()?;
                Ok(Moved::Completed { info: Box::new(info), postcopy })
            }
            Err(PostcopyError { guest: GuestAt::Source, error, .. }) if !self.is_confirmed() => {
                Err(self.switched.back(error, log, guest))
            }
            Err(PostcopyError { error, is_confirmed, .. }) => {
                tracing::warn!(%error, "post-copy is interrupted: the destination lacks pages");
                self.source.0.is_confirmed |= is_confirmed;
                self.switched.becomes(Status::PostcopyPaused)?;
                self.error = error;
                Ok(Moved::Interrupted(Box::new(self)))
            }
        }
    }
}

/// Sends the rest of RAM of a guest that has left.
pub(crate) fn follow(
    mut switched: Switched,
    main: MainStream<Stream>,
    options: PostcopyOptions,
    send: SendOptions,
    log: &mut dyn DirtyLog,
    guest: &mut dyn Guest,
) -> Result<Moved> {
    let stop = switched.stop().clone();
    let Some((main, peer, machine, requests)) = main.into_switched() else {
        let error = Error::text("the main stream has not switched to post-copy");
        return Err(switched.back(error, log, guest));
    };
    let blocks = switched.blocks().clone();
    let kept = options.kept(machine.blocks(), switched.lacking());
    let mut contents = Contents::of_machine(machine, blocks, options);
    (contents.always_speaks, contents.is_confirmed) = (peer.always_speaks, false);
    contents.counts.on_start(switched.on_started());
    let sender = switched.take_sender();
    let over_channels = peer.takes_channels && sender.is_some();
    contents.counts.over_channels(over_channels);
    if !over_channels && sender.is_some() {
        tracing::info!("the destination takes the rest of RAM over main, and not over channels");
    }
    let (carriers, idle) = match sender {
        Some(sender) if over_channels => (Carriers::Channels(sender), None),
        idle => (Carriers::Main(requests.and_then(Requests::into_stream)), idle),
    };
    let interrupted = Interrupted {
        source: PostcopySource(contents),
        switched,
        channels: over_channels.then_some(send),
        error: Error::Cancelled,
    };
    let switch = Box::new(Switch { main, peer, kept, carriers });
    let ran = run(&interrupted.source.0, &stop, Begin::Switched(switch));
    // They carry nothing after the switch.
    drop(idle);
    interrupted.ended(ran, log, guest)
}

/// The time between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
