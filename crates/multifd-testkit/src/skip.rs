//! Skips a test that this machine cannot run.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;

/// Lists the running test as skipped, visibly.
///
/// # Panics
///
/// If `CI` or `MULTIFD_REQUIRE_QEMU` is set: there a skip is a failure.
pub fn skip(reason: &str) {
    let set = |name: &str| env::var(name).is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    assert!(!set("CI") && !set("MULTIFD_REQUIRE_QEMU"), "{reason}");
    lacks(reason);
}

/// Lists the running test as skipped because something is missing that cannot be installed: a part of the kernel, a
/// right. This is never a failure.
pub fn lacks(reason: &str) {
    let thread = std::thread::current();
    let line = format!("{}: {reason}\n", thread.name().unwrap_or("a test"));
    let listed = env::var_os("MULTIFD_SKIP_FILE")
        .and_then(|path| OpenOptions::new().append(true).create(true).open(path).ok())
        .is_some_and(|mut file| file.write_all(line.as_bytes()).is_ok());
    if !listed {
        // Bypasses the test runner, which hides the output of a passing test.
        let _ = std::io::stderr().write_all(format!("SKIPPED {line}").as_bytes());
    }
}
