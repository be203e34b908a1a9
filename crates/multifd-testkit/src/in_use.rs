//! Counts what this process uses, so that a test finds what was left behind.

use std::{env, fs, thread, time::Duration};

/// The numbers of this process's threads and descriptors. Under ThreadSanitizer, pipes are not counted: it starts a process
/// that finds the names of functions when it needs them.
///
/// # Panics
///
/// If the system does not report them.
pub fn in_use() -> (usize, usize) {
    let count = |folder| fs::read_dir(folder).expect("the process's own").count();
    let pipes = if env::var_os("TSAN_OPTIONS").is_some() { pipes() } else { 0 };
    (count("/proc/self/task"), count("/proc/self/fd") - pipes)
}

fn pipes() -> usize {
    let descriptors = fs::read_dir("/proc/self/fd").expect("the process's own").flatten();
    let targets = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("pipe:")).count()
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
