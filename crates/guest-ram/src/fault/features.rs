//! What a `userfaultfd` can do, and how memory is registered with it.

use std::{fmt, ops::BitOr};

use linux_raw_sys::general as sys;

use super::MemoryKind;

/// Features of a `userfaultfd`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// Missing pages of memory files and other shared memory (Linux 4.11).
    pub const MISSING_SHMEM: Self = Self(sys::UFFD_FEATURE_MISSING_SHMEM as u64);
    /// Missing huge pages (Linux 4.11).
    pub const MISSING_HUGETLB: Self = Self(sys::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Pages of shared memory that are in its file and not in the page table (Linux 5.14).
    pub const MINOR_SHMEM: Self = Self(sys::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// Huge pages that are in their file and not in the page table (Linux 5.13).
    pub const MINOR_HUGETLB: Self = Self(sys::UFFD_FEATURE_MINOR_HUGETLBFS as u64);
    /// Write protection of private memory (Linux 5.7).
    pub const PROTECT: Self = Self(sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64);
    /// Write protection of shared memory and huge pages (Linux 5.19).
    pub const PROTECT_SHARED: Self = Self(sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Write protection of pages that do not exist yet (Linux 6.4).
    pub const PROTECT_UNPOPULATED: Self = Self(sys::UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// Pages that nobody can access any more (Linux 6.6).
    pub const POISON: Self = Self(sys::UFFD_FEATURE_POISON as u64);
    /// Pages of this process that are moved into private memory instead of copied (Linux 6.8).
    pub const MOVE: Self = Self(sys::UFFD_FEATURE_MOVE as u64);
    /// Events of memory that is discarded (Linux 4.11). The thread that discards it waits until the event was read.
    pub const REMOVED: Self = Self(sys::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// Faults name the thread that waits (Linux 4.14).
    pub const THREAD: Self = Self(sys::UFFD_FEATURE_THREAD_ID as u64);

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Those of `other` that are not among these.
    #[must_use]
    pub fn lacking(self, other: Self) -> Self {
        Self(other.0 & !self.0)
    }

    /// Those of `other` that are among these, too.
    pub(super) fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    pub(super) const fn of_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The Linux version that has all of these.
    pub(super) fn since(self) -> &'static str {
        let last = NAMES.iter().filter(|(feature, ..)| self.contains(*feature)).map(|(_, _, since)| *since);
        last.max_by_key(|since| version(since)).unwrap_or("4.3")
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = NAMES.iter().filter(|(feature, ..)| self.contains(*feature)).map(|(_, name, _)| *name);
        let names: Vec<_> = names.collect();
        match names.as_slice() {
            [] => write!(f, "{:#x}", self.0),
            names => f.write_str(&names.join(", ")),
        }
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}

fn version(text: &str) -> (u32, u32) {
    let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut parts = text.split('.');
    (number(parts.next()), number(parts.next()))
}

/// Which accesses cause a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modes(u64);

impl Modes {
    /// Accesses to pages that do not exist. They are placed by [`Armed::copy`](super::Armed::copy).
    pub const MISSING: Self = Self(sys::UFFDIO_REGISTER_MODE_MISSING as u64);
    /// Writes to pages that are [protected](super::Armed::protect).
    pub const WRITES: Self = Self(sys::UFFDIO_REGISTER_MODE_WP as u64);
    /// Accesses to pages of shared memory that exist in the file and not in the page table. They are mapped by
    /// [`Armed::resume`](super::Armed::resume).
    pub const MINOR: Self = Self(sys::UFFDIO_REGISTER_MODE_MINOR as u64);

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    pub(super) fn of_bits(bits: u64) -> Option<Self> {
        let all = Self::MISSING | Self::WRITES | Self::MINOR;
        Some(Self(bits)).filter(|modes| bits != 0 && all.contains(*modes))
    }

    /// The features without which memory of this kind cannot be registered in this way.
    pub(super) fn need(self, kind: MemoryKind) -> Features {
        let mut needed = Features::NONE;
        let mut need = |mode, feature| {
            if self.contains(mode) {
                needed = needed | feature;
            }
        };
        match kind {
            MemoryKind::Anonymous => need(Self::WRITES, Features::PROTECT),
            MemoryKind::Shared => {
                need(Self::MISSING, Features::MISSING_SHMEM);
                need(Self::MINOR, Features::MINOR_SHMEM);
                need(Self::WRITES, Features::PROTECT | Features::PROTECT_SHARED);
            }
            MemoryKind::Huge { .. } => {
                need(Self::MISSING, Features::MISSING_HUGETLB);
                need(Self::MINOR, Features::MINOR_HUGETLB);
                need(Self::WRITES, Features::PROTECT | Features::PROTECT_SHARED);
            }
        }
        needed
    }

    /// The calls without which memory that is registered in this way cannot be served, one bit each.
    pub(super) fn calls(self) -> u64 {
        let of = |mode, call: u32| if self.contains(mode) { 1 << call } else { 0 };
        (1 << sys::_UFFDIO_WAKE)
            | of(Self::MISSING, sys::_UFFDIO_COPY)
            | of(Self::WRITES, sys::_UFFDIO_WRITEPROTECT)
            | of(Self::MINOR, sys::_UFFDIO_CONTINUE)
    }
}

impl BitOr for Modes {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What depends on the kind of memory, or only makes numbers better, and is used where the kernel has it.
pub(super) const OPTIONAL: Features = Features(
    Features::MISSING_SHMEM.0
        | Features::MISSING_HUGETLB.0
        | Features::MINOR_SHMEM.0
        | Features::MINOR_HUGETLB.0
        | Features::PROTECT.0
        | Features::PROTECT_SHARED.0
        | Features::MOVE.0
        | Features::THREAD.0,
);

/// What this library knows.
pub(super) const ALL: Features =
    Features(OPTIONAL.0 | Features::PROTECT_UNPOPULATED.0 | Features::POISON.0 | Features::REMOVED.0);

/// The features that this library can use, each with its name in the kernel and the version that has it.
const NAMES: [(Features, &str, &str); 11] = [
    (Features::MISSING_SHMEM, "MISSING_SHMEM", "4.11"),
    (Features::MISSING_HUGETLB, "MISSING_HUGETLBFS", "4.11"),
    (Features::REMOVED, "EVENT_REMOVE", "4.11"),
    (Features::THREAD, "THREAD_ID", "4.14"),
    (Features::PROTECT, "PAGEFAULT_FLAG_WP", "5.7"),
    (Features::MINOR_HUGETLB, "MINOR_HUGETLBFS", "5.13"),
    (Features::MINOR_SHMEM, "MINOR_SHMEM", "5.14"),
    (Features::PROTECT_SHARED, "WP_HUGETLBFS_SHMEM", "5.19"),
    (Features::PROTECT_UNPOPULATED, "WP_UNPOPULATED", "6.4"),
    (Features::POISON, "POISON", "6.6"),
    (Features::MOVE, "MOVE", "6.8"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_name_themselves_and_the_kernel_that_has_them_all() {
        let some = Features::POISON | Features::MISSING_SHMEM;
        assert_eq!(some.to_string(), "MISSING_SHMEM, POISON");
        assert_eq!((some.since(), Features::MISSING_SHMEM.since()), ("6.6", "4.11"));
        assert_eq!(Features::MISSING_SHMEM.lacking(some), Features::POISON);
        let every = NAMES.iter().fold(Features::NONE, |all, (feature, ..)| all | *feature);
        assert_eq!(every.since(), "6.8");
        assert!(every.contains(OPTIONAL));
    }

    #[test]
    fn each_kind_of_memory_needs_its_features() {
        let all = Modes::MISSING | Modes::WRITES | Modes::MINOR;
        assert_eq!(all.need(MemoryKind::Anonymous), Features::PROTECT);
        assert!(all.need(MemoryKind::Shared).contains(Features::MINOR_SHMEM));
        assert!(all.need(MemoryKind::Huge { private: false }).contains(Features::MISSING_HUGETLB));
        assert_eq!(Modes::of_bits(0), None);
        assert_eq!(Modes::of_bits(8), None);
        assert_eq!(Modes::of_bits(3), Some(Modes::MISSING | Modes::WRITES));
    }
}
