//! What every fuzz target is held to, beside not to fail: a small input may not take much memory.
//!
//! What Rust code allocates is counted. Guest memory that is mapped is not, nor is what a library in C takes (zstd): for that
//! there is libFuzzer's limit of one allocation, which it can keep to with the address sanitizer alone.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    error::Error,
    fs::File,
    sync::atomic::{AtomicUsize, Ordering},
};

use multifd::error::{chain, is_executed};

/// Runs a target on an input.
///
/// # Panics
/// If an input of up to 1 KiB had more than 64 MiB allocated at one time.
pub fn bounded(input: &[u8], target: impl FnOnce(&[u8])) {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    target(input);
    let taken = PEAK.load(Ordering::SeqCst).saturating_sub(before);
    assert!(
        input.len() > SMALL || taken <= MOST,
        "{} bytes of input had {taken} bytes allocated",
        input.len()
    );
}

/// The value, or `None` after a check of the error: what somebody else chose may not reach a terminal as it came.
///
/// # Panics
/// If the text of the error or of a cause has a character that a terminal executes.
pub fn shown<T, E: Error + 'static>(result: Result<T, E>) -> Option<T> {
    let error = match result {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    for cause in chain(&error) {
        let text = cause.to_string();
        assert!(!text.contains(is_executed), "{text:?}");
    }
    None
}

/// An empty file in memory, which may become longer than on most disks.
///
/// # Panics
/// If the system has none.
pub fn file() -> File {
    rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory").into()
}

/// A target, and the fuzzer's entry to it.
#[macro_export]
macro_rules! target {
    ($target:expr) => {
        libfuzzer_sys::fuzz_target!(|input: &[u8]| $crate::bounded(input, $target));
    };
}

/// The system's allocator, with what is allocated counted.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator does the work, and is asked for exactly what was asked here; that `realloc` of the trait
// allocates, copies and frees by these two keeps the count right.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the pointer came from `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

const SMALL: usize = 1 << 10;
const MOST: usize = 64 << 20;
