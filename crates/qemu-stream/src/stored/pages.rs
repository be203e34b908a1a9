//! What is kept of pages.

/// What is kept of the pages of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// All of them.
    #[default]
    Keep,
    /// Only which pages there are. [`StoredMachine::ram_blocks`](crate::mapped_ram::StoredMachine::ram_blocks) of such a machine
    /// fails.
    Count,
}
