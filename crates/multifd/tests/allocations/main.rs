//! No channel allocates for a packet, and no pass for a page: counted over a whole pass, by the allocator.
//!
//! A program of its own with one test, so that nobody else allocates meanwhile.
//!
//! UNSAFETY: an allocator is an unsafe trait; this one counts and has the system's do the work.
#![expect(unsafe_code, reason = "an allocator that counts")]

#[cfg(test)]
#[path = "../costs/kit.rs"]
mod kit;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering},
};

struct Counting;

/// Sequentially consistent: read behind the answer of a destination, whose threads have counted before it.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed on to the system's allocator as it came, and its answer as it comes.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// An eighth of its packets. What is allocated has nothing to do with them: a pass adds its channels' counters up, and the
/// acceptor goes back to its wait whenever it gets to it.
#[cfg(test)]
const PER_PASS: u64 = 32;

#[test]
fn no_packet_and_no_page_costs_an_allocation() {
    use multifd::Method;

    let methods = [
        Method::None,
        #[cfg(feature = "zlib")]
        Method::Zlib,
        #[cfg(feature = "zstd")]
        Method::Zstd,
    ];
    for method in methods {
        let (source, destination) = (kit::ram(true), kit::ram(false));
        let mut passed = Vec::with_capacity(4);
        kit::migrate(kit::ends(), [&source, &destination], method, |_| {
            passed.push(ALLOCATIONS.load(Ordering::SeqCst));
        });
        assert_eq!(kit::wrong_page(&destination), None);
        let [first, last] = passed[..] else { panic!("two passes, found {passed:?}") };
        assert!(first > 0, "the allocator counts");
        let found = last - first;
        assert!(
            found <= PER_PASS,
            "{found} allocations in a pass over {} pages, method {method:?}",
            kit::PAGES
        );
    }
}
