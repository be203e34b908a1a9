//! Counts what this process uses, so that a test finds what was left behind.

use std::{fs, thread, time::Duration};

/// The numbers of this process's threads and descriptors.
///
/// # Panics
///
/// If the system does not report them.
pub fn in_use() -> (usize, usize) {
    let count = |folder| fs::read_dir(folder).expect("the process's own").count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// The same, as soon as they equal `before`, or after 200 ms: a thread that was joined is listed for a moment longer.
///
/// # Panics
///
/// If the system does not report them.
pub fn in_use_after(before: (usize, usize)) -> (usize, usize) {
    let mut now = in_use();
    for _ in 0..200 {
        if now == before {
            break;
        }
        thread::sleep(Duration::from_millis(1));
        now = in_use();
    }
    now
}
