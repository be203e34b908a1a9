//! Guest RAM in files: direct I/O, transfers straight between memory and file, and errors of files.

mod buffer;
mod direct;
mod huge;
mod regular;
pub(crate) mod size_limit;
mod transfer;
mod truncated;

pub use buffer::AlignedBuffer;
pub use direct::DirectFile;
pub use regular::{kind_of_file, open_regular};
pub use size_limit::{file_size_limit, hold_in_this_thread, with_file_size_errors};
pub use transfer::{Transfer, TransferError};
pub(crate) use truncated::explained;
pub use truncated::truncated;
