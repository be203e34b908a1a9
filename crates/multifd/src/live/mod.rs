//! A live migration at the source: passes over dirty RAM while the guest runs, then the switchover.
//!
//! ```text
//! none ─▶ setup ─▶ active ─▶ [pre-switchover] ─▶ device ─▶ completed
//!            └───────┴──────────────┴──────────────┴──▶ failed, or cancelling ─▶ cancelled
//!
//! pass: dirty bits ─▶ pages ─▶ channels (or main)          flush: SYNC on all channels, then main's record
//! ```
//!
//! [`Migration::run`] drives the migration in the caller's thread: it decides when to walk, when to sync and how to go
//! back. `converge/` decides when the rest fits into the downtime, what to expect and whether to throttle the guest. A
//! [`Main`] writes the main stream, a [`DirtyLog`] lists what the guest has written, and a [`Guest`] is stopped for the
//! switchover.

mod back;
mod caught;
mod control;
pub(crate) mod converge;
mod deadline;
mod device_name;
mod driver;
mod guest;
mod known;
mod main_stream;
#[cfg(shuttle)]
pub mod model;
mod owner;
mod pace;
mod pass;
mod plan;
mod progress;
mod rounds;
mod status;
mod switched;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

pub use crate::options::{MigrateOptions, PostcopyWhen, ZeroPageDetection};
use caught::panicked;
pub use control::Control;
use control::Gate;
pub use device_name::DeviceName;
use driver::{Driven, Driver, Stopped};
pub use guest::{DeviceInfo, DeviceSection, Guest, RunState};
pub use main_stream::{Main, Pass, Round, Verdict};
pub use owner::{LastWord, Owner};
use pace::Pace;
use plan::Plan;
pub use progress::{MigrationInfo, Progress, RamInfo};
pub use switched::{Ended, Switched};

pub use crate::outcome::{Bound, Callback, NotConverged, Percent, Remedy, Stall, Status};

use crate::{
    channel::{CallbackWatch, Connect, Stop},
    error::{Result, Usage},
    options::parameters::STALL_TIMEOUT,
    ram::{DirtyLog, RamBlocks},
    send::Sender,
    sendable,
};

/// One live migration, from set-up to completion.
pub struct Migration {
    plan: Plan,
    sender: Option<Sender>,
}

impl std::fmt::Debug for Migration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Migration")
            .field("options", &self.plan.options)
            .field("stop", &self.plan.stop)
            .finish_non_exhaustive()
    }
}

impl Migration {
    /// Creates a migration over the channels of `sender`, with its blocks and its stop.
    ///
    /// # Errors
    /// [`Usage::OutOfRange`] if an option is out of its range.
    pub fn new(options: MigrateOptions, sender: Sender) -> Result<Self> {
        let (blocks, stop) = (sender.blocks().clone(), sender.stop().clone());
        let callback_timeout = sender.stall_timeout();
        Self::made(options, blocks, stop, Some(sender), callback_timeout)
    }

    /// Creates a migration without channels: all pages go over main. `stop` cancels it from any thread.
    ///
    /// # Errors
    /// As [`new`](Migration::new); [`Usage::PartialPage`] if a block ends inside a page; [`Usage::MayShrink`] if its
    /// memory is a file that another process [may truncate](crate::ram::Mapping::may_shrink).
    pub fn over_main(options: MigrateOptions, blocks: Arc<RamBlocks>, stop: Stop) -> Result<Self> {
        sendable::check_whole_pages(&blocks)?;
        sendable::check_may_be_copied(&blocks)?;
        stop.take()?;
        Self::made(options, blocks, stop, None, Some(STALL_TIMEOUT.default_time()))
    }

    fn made(
        options: MigrateOptions,
        blocks: Arc<RamBlocks>,
        stop: Stop,
        sender: Option<Sender>,
        callback_timeout: Option<Duration>,
    ) -> Result<Self> {
        options.check()?;
        let sent = blocks.iter().filter(|(_, block)| !block.is_ignored());
        let pages = sent.map(|(_, block)| block.pages()).sum();
        let progress = Progress::new(blocks.total(), blocks.page_size(), pages, stop.callbacks().clone());
        let (gate, calls) = (Gate::new(&options), progress.callbacks().clone());
        let plan = Plan { options, blocks, stop, progress, gate, calls, callback_timeout };
        Ok(Self { plan, sender })
    }

    /// How long a callback of the guest or of the dirty log may run. After that the migration fails with
    /// [`Error::CallbackHangs`](crate::Error::CallbackHangs), which names the callback. Default: the
    /// [stall timeout](crate::SendOptions::stall_timeout) of the sender, or 120 s without channels; `None` is no limit.
    #[must_use]
    pub fn callback_timeout(mut self, limit: Option<Duration>) -> Self {
        self.plan.callback_timeout = limit;
        self
    }

    /// Connects the channels: see [`Sender::set_up`]. Not for a sender that was set up before.
    ///
    /// # Errors
    /// As [`Sender::set_up`]; [`Usage::TooEarly`] without channels.
    pub fn set_up(&mut self, connector: Arc<dyn Connect>) -> Result<()> {
        let sender = self.sender.as_mut().ok_or(Usage::TooEarly("the sender"))?;
        sender.fail_when_closed()?;
        sender.set_up(connector)
    }

    /// A handle that controls this migration from any thread: it continues after the pause before the switchover and
    /// changes options while the migration runs.
    pub fn control(&self) -> Control {
        self.plan.gate.control(self.plan.progress.clone())
    }

    /// The numbers of this migration, for another thread to read.
    pub fn progress(&self) -> Progress {
        self.plan.progress.clone()
    }

    /// The stop that cancels the migration, from any thread.
    pub fn stop(&self) -> &Stop {
        &self.plan.stop
    }

    /// Checks what [`run`](Migration::run) would refuse before it begins and what depends only on the guest. Call it
    /// before anything is connected.
    ///
    /// # Errors
    /// [`Usage::DeviceTwice`], [`Usage::NoThrottle`].
    pub fn check_guest(&self, guest: &dyn Guest) -> Result<()> {
        let _watch = CallbackWatch::start(&self.plan.stop, self.plan.callback_timeout)?;
        self.plan.devices_of(guest).map(drop)
    }

    /// Runs the migration.
    ///
    /// `Ok` means that the destination has the guest, which stays stopped here. After an error the guest is here and as
    /// it was before: a guest that ran continues, and a paused guest stays paused. The dirty bits of all pages are put
    /// back, because no destination has them. A cancel after everything has been sent asks the destination: if it has
    /// the guest already, the result is `Ok`.
    ///
    /// # Errors
    /// The first error, or [`Error::Cancelled`](crate::Error::Cancelled). [`Error::OwnerUnknown`](crate::Error::OwnerUnknown) if nobody can know whether the destination has
    /// the guest. Only in this case **the guest stays stopped** although it may not run elsewhere, unless
    /// [`resume_if_unknown`](MigrateOptions::resume_if_unknown) is set.
    /// [`Usage::NoPostcopy`] if the options allow post-copy, before anything is sent: that needs
    /// [`run_postcopy`](Self::run_postcopy).
    pub fn run(
        self,
        main: &mut dyn Main,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<MigrationInfo> {
        if self.plan.options.postcopy.is_allowed() {
            let why = "its caller does not send the pages after the switch (Migration::run_postcopy does)";
            return Err(self.plan.stop.fail(Usage::NoPostcopy { why }.into()));
        }
        match self.run_postcopy(main, log, guest)? {
            Ended::Completed(info) => Ok(*info),
            Ended::Switched(switched) => Ok(switched.progress().info()),
        }
    }

    /// Does the same, but may [switch to post-copy](MigrateOptions::postcopy). After that the caller sends the rest of RAM over main
    /// and the channels. Until the destination reports that it does not have the guest, the guest must not run here.
    ///
    /// # Errors
    /// As [`run`](Self::run). The guest is here then.
    pub fn run_postcopy(
        mut self,
        main: &mut dyn Main,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Result<Ended> {
        let mut sender = self.sender.take();
        let mut stopped = Stopped::No;
        let _watch = match CallbackWatch::start(&self.plan.stop, self.plan.callback_timeout) {
            Ok(watch) => watch,
            Err(error) => return Err(self.plan.go_back(error, sender, stopped, log, guest)),
        };
        let mut driver =
            Driver::new(&self.plan, sender.as_mut(), &mut *main, &mut *log, &mut *guest, &mut stopped);
        // After a panic, the state is used only for an orderly end: for the guest, and for bits that are put back in
        // any case.
        let driven = catch_unwind(AssertUnwindSafe(|| {
            let driven = driver.drive();
            driver.count_main();
            driven
        }));
        let driven = driven
            .unwrap_or_else(|panic| Err(stopped.after_panic(panicked(self.plan.calls.panicked(), &*panic))));
        let driven = match driven {
            Ok(driven) => driven,
            Err(error) => return Err(self.plan.go_back(error, sender, stopped, log, guest)),
        };
        if let Driven::Switched { lacking, stopped_at } = driven {
            let switched = Switched { plan: self.plan, sender, lacking, stopped_at, stopped };
            return Ok(Ended::Switched(Box::new(switched)));
        }
        if let Some(sender) = sender {
            // The destination runs the guest now; an error while closing the connections changes nothing.
            if let Err(error) = sender.finish() {
                tracing::debug!(%error, "an error after completion");
            }
        }
        self.plan.progress.advance(Status::Completed)?;
        Ok(Ended::Completed(Box::new(self.plan.progress.info())))
    }
}
