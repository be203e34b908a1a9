//! Guest memory in this process: mappings, slices of them, and their state in the page table.

pub(crate) mod areas;
mod backing;
mod copy;
mod mapped_from;
mod mapping;
mod part;
#[cfg(feature = "vm-memory")]
mod regions;
pub(crate) mod residency;
mod slice;
mod zero;

pub use mapping::{Access, Mapping};
pub use part::{MAX_PARTS, Part, PartMut, advance, advance_mut};
#[cfg(feature = "vm-memory")]
pub use regions::{block_of, blocks_of};
pub use slice::GuestSlice;
