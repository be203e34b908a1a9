//! The kinds of memory that differ in what the kernel can do with their faults.

/// What kind of memory a block is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Private memory of no file.
    Anonymous,
    /// A memory file or other shared memory, in pages of the usual size. Also a private mapping of such a file.
    Shared,
    /// Huge pages that were set aside (`hugetlbfs`).
    Huge {
        /// Whether they are private to this process.
        private: bool,
    },
}

impl MemoryKind {
    /// Whether memory that is discarded (`MADV_DONTNEED`) is zero afterwards. Otherwise it may still be in the file.
    pub fn is_private(self) -> bool {
        matches!(self, Self::Anonymous | Self::Huge { private: true })
    }
}
