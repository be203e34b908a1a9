//! The slots of a block's digests, in groups that exist when one of their pages does.

use std::{
    array,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// The number of pages of a group: its digests are 8 KiB.
pub(super) const GROUP: usize = 512;
/// The number of groups of a table.
const TABLE: usize = 512;

/// The groups of a block. Tables and groups are made when first needed, so that a block of terabytes costs little.
#[derive(Debug)]
pub(super) struct Groups(Box<[OnceLock<Table>]>);

type Table = Box<[OnceLock<Group>]>;

/// The slots of neighbouring pages.
#[derive(Debug)]
pub(super) struct Group(Box<[Slot; GROUP]>);

impl Groups {
    pub(super) fn new(pages: u64) -> Self {
        let tables = pages.div_ceil((GROUP * TABLE) as u64);
        Self((0..tables).map(|_| OnceLock::new()).collect())
    }

    /// The group of a page, if it was made.
    pub(super) fn get(&self, page: u64) -> Option<&Group> {
        let (table, group) = at(page);
        self.0.get(table)?.get()?.get(group)?.get()
    }

    /// The group of a page.
    ///
    /// # Panics
    /// If the block has no such page.
    pub(super) fn make(&self, page: u64) -> &Group {
        self.cell(page).get_or_init(|| Group::filled(std::iter::empty()))
    }

    /// The group of a page. If it must be made, it contains `digests`.
    ///
    /// # Panics
    /// If the block has no such page.
    pub(super) fn fill(&self, page: u64, digests: impl Iterator<Item = u128>) -> &Group {
        self.cell(page).get_or_init(|| Group::filled(digests))
    }

    fn cell(&self, page: u64) -> &OnceLock<Group> {
        let (table, group) = at(page);
        let table = self.0.get(table).expect("a page of the block");
        &table.get_or_init(|| (0..TABLE).map(|_| OnceLock::new()).collect())[group]
    }
}

impl Group {
    fn filled(digests: impl Iterator<Item = u128>) -> Self {
        let group = Self(Box::new(array::from_fn(|_| Slot::default())));
        group.0.iter().zip(digests).for_each(|(slot, digest)| slot.set(digest));
        group
    }

    pub(super) fn get(&self, page: u64) -> u128 {
        self.0[within(page)].get()
    }

    pub(super) fn set(&self, page: u64, digest: u128) {
        self.0[within(page)].set(digest);
    }
}

/// The table of a page and the group in it.
fn at(page: u64) -> (usize, usize) {
    let group = page / GROUP as u64;
    let table = usize::try_from(group / TABLE as u64).unwrap_or(usize::MAX);
    (table, usize::try_from(group % TABLE as u64).unwrap_or_default())
}

/// The slot of a page in its group.
fn within(page: u64) -> usize {
    usize::try_from(page % GROUP as u64).unwrap_or_default()
}

/// 128 bits that any thread may write and read. Two that write at the same time may leave a mixture.
#[derive(Debug, Default)]
struct Slot([AtomicU64; 2]);

impl Slot {
    // Relaxed: what orders the pages themselves orders their digests.
    fn get(&self) -> u128 {
        let [high, low] = &self.0;
        u128::from(high.load(Ordering::Relaxed)) << 64 | u128::from(low.load(Ordering::Relaxed))
    }

    fn set(&self, digest: u128) {
        let [high, low] = &self.0;
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        low.store(digest as u64, Ordering::Relaxed);
        high.store((digest >> 64) as u64, Ordering::Relaxed);
    }
}
