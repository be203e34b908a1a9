//! Where a copier puts the pages.

use std::error::Error;

use crate::PageRun;

/// Why pages cannot be stored.
pub type StoreError = Box<dyn Error + Send + Sync>;

/// What a copier stores pages in: a file, a connection. Several threads store at the same time, in no order.
pub trait PageSink: Send + Sync {
    /// Stores these pages, each of which comes once. `bytes` are private to the caller, and do not change. Pages that never come are zero.
    ///
    /// # Errors
    /// If they cannot be stored. The copier ends then, and the guest continues.
    fn store(&self, run: PageRun, bytes: &[u8]) -> Result<(), StoreError>;
}
