//! The end of a migration that has failed: the guest is here, as it was before.

use super::{Guest, caught::caught, driver::Stopped, plan::Plan};
use crate::{
    error::Error,
    outcome::{Callback, Percent, Status},
    ram::{DirtyLog, PageBitmap},
    send::Sender,
};

impl Plan {
    /// Ends a migration that has failed, with the guest here. Returns the error to report.
    pub(super) fn go_back(
        &self,
        error: Error,
        sender: Option<Sender>,
        stopped: Stopped,
        log: &mut dyn DirtyLog,
        guest: &mut dyn Guest,
    ) -> Error {
        let unknown = matches!(error, Error::OwnerUnknown(_));
        let calls = &self.calls;
        // The first error is reported; it has shut everything down.
        let first = self.stop.fail(error.clone());
        let mut error = if unknown { error } else { first };
        if self.progress.throttle().is_some() {
            let freed = caught(calls, Callback::GuestThrottle, || guest.throttle(Percent::NONE));
            if let Err(error) =
                freed.and_then(|freed| freed.map_err(|error| Error::io("throttle the guest", error)))
            {
                tracing::warn!(%error, "the guest is still throttled");
            }
        }
        // The guest is resumed first: the rest of the clean-up does not write to its RAM.
        let resumes = stopped.resumes() && (!unknown || self.options.resume_if_unknown);
        if resumes && let Err(panicked) = caught(calls, Callback::GuestResume, || guest.resume()) {
            error = Error::NotResumed { error: Box::new(error), panicked: Box::new(panicked) };
        }
        drop(sender);
        for (index, block) in self.blocks.iter() {
            let full = PageBitmap::full(block.pages());
            let put = caught(calls, Callback::DirtyLogPutBack, || log.put_back(index, &full));
            if let Err(error) = put {
                tracing::warn!(block = %block.name(), %error, "dirty bits are missing in the log");
            }
        }
        let states: &[Status] =
            if error.is_cancelled() { &[Status::Cancelling, Status::Cancelled] } else { &[Status::Failed] };
        for state in states {
            if let Err(error) = self.progress.advance(*state) {
                tracing::debug!(%error, "the status is final already");
            }
        }
        error
    }
}
