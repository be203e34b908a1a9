//! Tests that memory and disk follow what came, not what was announced: the allocator counts, and the file's blocks are
//! counted by the system.
//!
//! It is a separate program with one test, so that nothing else allocates in the meantime.
//!
//! UNSAFETY: an allocator is an unsafe trait; this one counts and calls the system's.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout as MemoryLayout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

#[cfg(test)]
mod announced;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded to the system's allocator unchanged, and so is its result. `realloc` of the trait
// allocates, copies and frees by these.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: MemoryLayout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Runs it and checks that it had no more than [`MOST`] bytes allocated at one time.
#[cfg(test)]
fn bounded<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let result = run();
    let taken = PEAK.load(Ordering::SeqCst) - before;
    assert!(taken > 0, "the allocator counts");
    assert!(taken <= MOST, "{what}: {taken} bytes allocated");
    println!("{what}: {taken} bytes allocated");
    result
}

#[cfg(test)]
const MOST: usize = 16 << 20;
