//! The memory of a stored machine by guest-physical addresses, as its processors see it.
//!
//! ```text
//! blocks ─┬─ places of the caller ────────────────────────┐
//!         ├─ addresses in the block list (x-ignore-shared) ┼─▶ PhysicalMap: ranges, sorted, without overlaps
//!         └─ machine type; on a PC the CMOS ──────────────┘          │
//! pages ─────────────────────────────────────────────────▶ PhysicalMemory: reads, what is present
//! ```
//!
//! Only RAM has a place here. Firmware, video memory and registers of devices are not in the map.

#![warn(clippy::indexing_slicing)]

mod machine;
mod map;
mod memory;
mod range;

pub use map::{PhysicalMap, Place};
pub use memory::PhysicalMemory;
pub use range::{BadPlace, PhysicalAddress, PhysicalRange};

#[cfg(test)]
mod tests;
