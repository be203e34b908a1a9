//! Guest RAM: blocks, their pages and the mapping they live in.

mod name;
mod page;

pub use name::BlockName;
pub use page::{BlockOffset, PageIndex, PageSize};
