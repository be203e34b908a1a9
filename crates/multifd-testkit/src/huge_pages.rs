//! Huge pages of 2 MiB that are set aside for a test.

use std::{
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Huge pages that are set aside. The old number is restored at the drop. A process has one of these at a time: others wait.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    _only: MutexGuard<'static, ()>,
}

impl HugePages {
    /// The length of a page in bytes.
    pub const BYTES: u64 = 2 << 20;

    /// Sets pages aside. `None` if this system does not provide them; the test is then listed as skipped.
    pub fn reserve(pages: u64) -> Option<Self> {
        let only = ONLY.lock().unwrap_or_else(PoisonError::into_inner);
        let number = || fs::read_to_string(NUMBER).ok()?.trim().parse().ok();
        let reserved: Option<Self> = number().and_then(|before: u64| {
            fs::write(NUMBER, (before + pages).to_string()).ok()?;
            let reserved = Self { before, _only: only };
            (number()? >= before + pages).then_some(reserved)
        });
        if reserved.is_none() {
            crate::lacks("huge pages of 2 MiB");
        }
        reserved
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NUMBER, self.before.to_string());
    }
}

const NUMBER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
static ONLY: Mutex<()> = Mutex::new(());
