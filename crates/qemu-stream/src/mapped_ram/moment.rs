//! Captures a machine as it is at one moment, while its guest runs.
//!
//! ```text
//! Copier::prepare ─▶ Guest::stop ─ save ─▶ hold ─▶ Guest::resume ─▶ Copier ─▶ FilePages ─▶ finish: head, bitmaps, tail
//! guest runs         └────── guest is stopped ───┘                  guest runs; a page is copied before it writes to it
//! ```
//!
//! The devices are saved before the hold, because saving may write to memory. After each failure, the guest is resumed if it ran, its
//! memory is writable, and the file contains no machine.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    channel::Stop,
    live::{Guest, Main, RunState, Verdict},
    ram::{
        BlockIndex, BlockName, Copier, CopierError, CopierOptions, CopierStats, Memory, PageIndex, PageRun,
        PageSink, Prepared, RamBlocks, StoreError,
    },
};

use super::Capture;

/// Why a machine was not captured as it was at one moment. Its guest is as it was before, except after [`NotResumed`](Self::NotResumed).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MomentError {
    /// The file cannot be written, or does not fit.
    #[error(transparent)]
    File(#[from] multifd::Error),
    /// The memory cannot be protected, or a page was not copied.
    #[error("the guest's memory was not copied as it was at one moment")]
    Copier(#[from] CopierError),
    /// The capture has a [base](Capture::since).
    #[error(
        "a capture of one moment stores a whole machine, and this capture stores what differs from a base: capture in passes, or create it \
         without a base (Capture::of_guest)"
    )]
    Delta,
    /// A block's memory is not in this process.
    #[error("block {name:?} is not in mapped memory, so it cannot be protected against writing")]
    NotMapped {
        /// The block.
        name: BlockName,
    },
    /// The guest has refused.
    #[error("cannot {what}")]
    Guest {
        /// What was tried.
        what: &'static str,
        /// The guest's error.
        source: io::Error,
    },
    /// A method of the guest panicked.
    #[error("{what} panicked: {message}")]
    Panicked {
        /// The method.
        what: &'static str,
        /// The message of the panic.
        message: String,
    },
    /// The guest was stopped, and its method to resume it panicked. It may be stopped still.
    #[error("Guest::resume panicked ({message}): the guest may be stopped")]
    NotResumed {
        /// The message of the panic.
        message: String,
        /// What had failed before, if anything.
        source: Option<Box<Self>>,
    },
}

impl Capture {
    /// Captures the guest as it is at one moment: stops it, saves its devices, resumes it, and copies its memory while it runs. A page that the
    /// guest wants to write to is copied first. When this method returns, the guest runs again, if it [ran](Guest::run_state)
    /// before. The machine is in the file when [`finish`](MomentCapture::finish) has returned.
    ///
    /// The memory is protected before the stop. So the stop takes the time of the guest's own methods, and of protecting again what was
    /// written in the last moment before it. No dirty log is needed; those of KVM and of `vm-memory` may be running.
    ///
    /// **Warning:** writes of other processes that map the memory, of other mappings, and of devices that write by physical
    /// address are not noticed: see [`Copier::prepare`] and [`CopierOptions::sole_writer`].
    ///
    /// # Errors
    /// If the capture has a [base](Capture::since); if this process may not serve page faults, with the remedy; if the kernel lacks something
    /// (Linux 6.4 has everything); if the blocks do not fit; if a method of the guest fails or panics. The guest is resumed then, if it ran.
    pub fn at_moment(
        mut self,
        blocks: &Arc<RamBlocks>,
        guest: &mut dyn Guest,
        options: CopierOptions,
    ) -> Result<MomentCapture, MomentError> {
        match self.copy_of(blocks, guest, options) {
            Ok((copier, pause)) => {
                Ok(MomentCapture { capture: self, copier: Arc::new(copier), pause, is_complete: false })
            }
            Err(error) => {
                self.discard();
                Err(error)
            }
        }
    }

    fn copy_of(
        &mut self,
        blocks: &Arc<RamBlocks>,
        guest: &mut dyn Guest,
        options: CopierOptions,
    ) -> Result<(Copier, Duration), MomentError> {
        // A page of zeros, or a hole, would be taken for the page of the base.
        if self.has_base() {
            return Err(MomentError::Delta);
        }
        let devices = caught("Guest::devices", || guest.devices())?;
        self.expect(&devices)?;
        self.setup(blocks, None)?;
        let is_elsewhere = |block: &&multifd::ram::RamBlock| {
            !block.is_ignored() && !matches!(block.memory(), Memory::Mapped(_))
        };
        if let Some(block) = blocks.iter().map(|(_, block)| block).find(is_elsewhere) {
            return Err(MomentError::NotMapped { name: block.name().clone() });
        }
        let pages = FilePages { file: self.blocks().clone(), order: self.order().to_vec() };
        let prepared = Copier::prepare(blocks, Arc::new(pages), options)?;
        let state = caught("Guest::run_state", || guest.run_state())?;
        let begun = Instant::now();
        // After a panic of this method the guest may be stopped.
        let stopped = caught("Guest::stop", || guest.stop());
        let has_refused = matches!(stopped, Ok(Err(_)));
        let held = stopped
            .and_then(|stopped| {
                stopped.map_err(|source| MomentError::Guest { what: "stop the guest", source })
            })
            .and_then(|()| self.hold(prepared, guest, state));
        let is_resumed = state == RunState::Running && !has_refused;
        if is_resumed
            && let Err(MomentError::Panicked { message, .. }) = caught("Guest::resume", || guest.resume())
        {
            return Err(MomentError::NotResumed { message, source: held.err().map(Box::new) });
        }
        let pause = begun.elapsed();
        held.map(|copier| (copier, pause))
    }

    /// Saves the devices of the stopped guest, and holds its memory.
    fn hold(
        &mut self,
        prepared: Prepared,
        guest: &mut dyn Guest,
        state: RunState,
    ) -> Result<Copier, MomentError> {
        let saved = caught("Guest::save", || guest.save())?;
        let saved = saved.map_err(|source| MomentError::Guest { what: "save the devices", source })?;
        self.devices(saved, state)?;
        Ok(prepared.hold()?)
    }
}

/// A machine whose memory is being copied to its file, as it was when its guest was stopped. The guest runs.
///
/// If it is dropped before [`finish`](Self::finish) has returned, the file contains no machine; the guest continues.
#[derive(Debug)]
#[must_use]
pub struct MomentCapture {
    capture: Capture,
    copier: Arc<Copier>,
    pause: Duration,
    is_complete: bool,
}

impl MomentCapture {
    /// How long the guest was stopped: from the call of [`Guest::stop`] to the return of [`Guest::resume`].
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// The copier: its [counters](Copier::stats), and its [end](Copier::stop), which another thread may call to cancel the capture.
    pub fn copier(&self) -> &Arc<Copier> {
        &self.copier
    }

    /// Waits until all memory is in the file, and completes the file.
    ///
    /// # Errors
    /// [`CopierError::Incomplete`] if `limit` has passed; the capture continues, and the call can be repeated. After any other error the
    /// file contains no machine. The guest continues in all cases.
    pub fn finish(&mut self, limit: Option<Duration>) -> Result<CopierStats, MomentError> {
        let stats = match self.copier.finish(limit) {
            Ok(stats) => stats,
            Err(error @ CopierError::Incomplete { .. }) => return Err(error.into()),
            Err(error) => {
                self.capture.discard();
                return Err(error.into());
            }
        };
        if self.is_complete {
            return Ok(stats);
        }
        match self.capture.complete(&Stop::new()) {
            Verdict::Taken => {
                self.is_complete = true;
                Ok(stats)
            }
            Verdict::Refused(error) | Verdict::Unknown(error) => Err(error.into()),
        }
    }
}

impl Drop for MomentCapture {
    fn drop(&mut self) {
        if !self.is_complete {
            self.copier.stop();
            self.capture.discard();
        }
    }
}

/// Pages at their places in the file. Pages of zeros are left out.
struct FilePages {
    file: Arc<RamBlocks>,
    /// For each of the machine's blocks, its index in the file.
    order: Vec<BlockIndex>,
}

impl PageSink for FilePages {
    fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError> {
        let block = self.order.get(run.block.0).and_then(|index| self.file.get(*index));
        let block = block.ok_or("the file has no such block")?;
        let page = block.page_size().bytes();
        let zeros = vec![0; page];
        let is_zero = |bytes: &[u8]| bytes == zeros;
        let mut rest = bytes;
        let mut first = run.first.0;
        while !rest.is_empty() {
            let zero = rest.chunks(page).take_while(|bytes| is_zero(bytes)).count();
            rest = rest.get(zero * page..).unwrap_or_default();
            first += zero as u64;
            let count = rest.chunks(page).take_while(|bytes| !is_zero(bytes)).count();
            let (pages, after) = rest.split_at_checked(count * page).ok_or("half a page")?;
            if count > 0 {
                block.store_direct(PageIndex(first), pages)?;
            }
            first += count as u64;
            rest = after;
        }
        Ok(())
    }
}

/// Calls a method of the guest.
fn caught<T>(what: &'static str, call: impl FnOnce() -> T) -> Result<T, MomentError> {
    let called = catch_unwind(AssertUnwindSafe(call));
    called.map_err(|panic| MomentError::Panicked { what, message: message(&*panic) })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}
