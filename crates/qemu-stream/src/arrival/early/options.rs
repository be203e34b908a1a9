//! How a guest runs before its RAM is there.

use std::fmt;

use multifd::ram::{FaultsFrom, PagerOptions};

/// How a guest runs before its RAM is there.
#[must_use]
pub struct EarlyOptions {
    pub(super) faults_from: FaultsFrom,
    pub(super) pager: PagerOptions,
}

impl Default for EarlyOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for EarlyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EarlyOptions").field("faults_from", &self.faults_from).finish_non_exhaustive()
    }
}

impl EarlyOptions {
    /// Faults of everything that accesses the memory, one thread that serves them. A page that does not come is waited for.
    pub fn new() -> Self {
        Self { faults_from: FaultsFrom::Everything, pager: PagerOptions::new().fault_threads(1) }
    }

    /// Whose faults are delivered. Default [`FaultsFrom::Everything`], which a virtual machine needs.
    pub fn faults_from(mut self, from: FaultsFrom) -> Self {
        self.faults_from = from;
        self
    }

    /// How faults are served, and who decides about pages that do not come: the judge of these options. Nothing is prefetched.
    pub fn pager(mut self, options: PagerOptions) -> Self {
        self.pager = options;
        self
    }
}
