//! The state of one migration, shared by all threads.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::{
    error::{Result, Usage},
    outcome::Status,
};

/// The state of one migration, shared by all threads. It changes only along the arrows of [`Status::may_become`].
#[derive(Debug, Default)]
pub(crate) struct StatusCell(AtomicU8);

impl StatusCell {
    pub(crate) fn load(&self) -> Status {
        Status::ALL[usize::from(self.0.load(Ordering::Acquire))]
    }

    /// Changes the state to `next`.
    pub(crate) fn advance(&self, next: Status) -> Result<()> {
        let mut from = self.load();
        loop {
            if !from.may_become(next) {
                return Err(Usage::IllegalTransition { from, to: next }.into());
            }
            // Pairs with the acquire in `load`: a thread that sees the state sees what was done to reach it.
            match self.0.compare_exchange(from as u8, next as u8, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    tracing::debug!(%from, to = %next, "migrate_set_state");
                    return Ok(());
                }
                Err(now) => from = Status::ALL[usize::from(now)],
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_arrows_of_a_migration_can_be_walked() {
        let walked = |steps: &[Status]| {
            let cell = StatusCell::default();
            steps.iter().try_for_each(|step| cell.advance(*step)).map(|()| cell.load())
        };
        use Status::{Active, Cancelled, Cancelling, Completed, Device, Failed, PreSwitchover, Setup};
        assert_eq!(walked(&[Setup, Active, Device, Completed]).expect("legal"), Completed);
        let paused = [Setup, Active, PreSwitchover, Device, Completed];
        assert_eq!(walked(&paused).expect("legal"), Completed);
        assert_eq!(walked(&[Setup, Failed]).expect("legal"), Failed);
        assert_eq!(walked(&[Setup, Active, Cancelling, Cancelled]).expect("legal"), Cancelled);
        for steps in [
            &[Active][..],
            &[Setup, Device],
            &[Setup, PreSwitchover],
            &[Failed, Setup],
            &[Setup, Failed, Cancelling],
            &[Cancelled],
        ] {
            walked(steps).expect_err("illegal");
        }
        use Status::{PostcopyActive, PostcopyPaused, PostcopyRecover};
        let switched = [
            Setup,
            Active,
            Device,
            PostcopyActive,
            PostcopyPaused,
            PostcopyRecover,
            PostcopyActive,
            Completed,
        ];
        assert_eq!(walked(&switched).expect("legal"), Completed);
        walked(&[Setup, Active, PostcopyActive]).expect_err("illegal");
        let refused = walked(&[Setup, Completed]).expect_err("illegal");
        assert_eq!(refused.to_string(), "a migration that is setup cannot become completed");
    }

    #[test]
    fn every_state_is_found_again_by_its_number() {
        for status in Status::ALL {
            assert_eq!(Status::ALL[status as usize], status);
        }
    }
}
