//! A round is a pass and its sync point. The destination may be asked what it has of it.

use super::{Main, Round, progress::Progress};
use crate::{error::Result, ram::PageBitmap, send::Sender};

/// Asks at the end of the set-up whether the destination continues without a channel that breaks.
pub(super) fn agree(main: &mut dyn Main, sender: Option<&mut Sender>, pending: &[PageBitmap]) -> Result<()> {
    let Some(sender) = sender else { return Ok(()) };
    match main.round()? {
        Round::NotAgreed => Ok(()),
        Round::Confirmed { lost } => {
            sender.tolerate()?;
            sender.settle(&lost, pending).map(drop)
        }
    }
}

/// Asks what the destination has of a round. Pages that it lacks are set in `pending`.
pub(super) fn settle(
    main: &mut dyn Main,
    sender: Option<&mut Sender>,
    pending: &[PageBitmap],
    progress: &Progress,
) -> Result<()> {
    let Some(sender) = sender else { return Ok(()) };
    let Round::Confirmed { lost } = main.round()? else { return Ok(()) };
    let pages = sender.settle(&lost, pending)?;
    if pages > 0 {
        tracing::debug!(pages, ?lost, "pages of broken channels are sent again");
    }
    progress.lost(lost);
    Ok(())
}
