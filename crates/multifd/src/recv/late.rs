//! Pages that arrive after the switch to post-copy: the guest uses the memory already.

use std::fmt;

use crate::{error::Result, ram::PageRun};

/// Places pages that arrive when the guest uses the memory already. A page that is there must stay as it is, because the guest may have
/// written it. Several threads call it at the same time.
pub trait PlaceLate: fmt::Debug + Send + Sync {
    /// These pages have these bytes.
    ///
    /// # Errors
    /// If they cannot be placed. The migration fails then.
    fn place(&self, run: PageRun, bytes: &[u8]) -> Result<()>;

    /// These pages are zero.
    ///
    /// # Errors
    /// If they cannot be placed. The migration fails then.
    fn zero(&self, run: PageRun) -> Result<()>;
}
