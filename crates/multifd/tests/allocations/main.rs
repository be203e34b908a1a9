//! Tests that no channel allocates for a packet, and no pass for a page: the allocator counts over a whole pass.
//!
//! It is a separate program with one test, so that nothing else allocates in the meantime.
//!
//! UNSAFETY: an allocator is an unsafe trait; this one counts and calls the system's.
#![expect(unsafe_code, reason = "an allocator that counts")]

#[cfg(test)]
#[path = "../costs/kit.rs"]
mod kit;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering},
};

struct Counting;

/// Sequentially consistent: it is read after the reply of a destination, whose threads have counted before it.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is forwarded to the system's allocator unchanged, and so is its result.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// An eighth of its packets. The remaining allocations do not depend on packets: a pass sums its channels' counters,
/// and the acceptor returns to its wait at some point.
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
