//! Tests of the bitmaps against a set of numbers, and of what they allocate.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use proptest::prelude::*;

use super::*;

fn pages(bitmap: &PageBitmap) -> BTreeSet<u64> {
    (0..bitmap.pages()).filter(|page| bitmap.contains(PageIndex(*page))).collect()
}

#[test]
fn runs_are_the_set_bits_in_the_fewest_pieces() {
    let of = |word| runs(0, word).map(|(first, count)| (first.0, count)).collect::<Vec<_>>();
    assert_eq!(of(0), []);
    assert_eq!(of(u64::MAX), [(0, 64)]);
    assert_eq!(of(0b1101), [(0, 1), (2, 2)]);
    assert_eq!(of(1 << 63 | 1), [(0, 1), (63, 1)]);
}

proptest! {
    #[test]
    fn a_bitmap_does_what_a_set_of_numbers_does(
        length in prop_oneof![3 => 1_u64..300, 1 => 1_u64..5_000],
        full: bool,
        steps in prop::collection::vec((0..8_u8, any::<u64>(), any::<u64>()), 0..60),
    ) {
        let bitmap = if full { PageBitmap::full(length) } else { PageBitmap::new(length) };
        let other = PageBitmap::new(length);
        let (mut model, mut taken) = (if full { (0..length).collect() } else { BTreeSet::new() }, BTreeSet::new());
        for (step, a, b) in steps {
            let page = a % length;
            match step {
                0 => prop_assert_eq!(bitmap.set(PageIndex(page)), !model.insert(page)),
                1 => prop_assert_eq!(bitmap.clear(PageIndex(page)), model.remove(&page)),
                2 => {
                    let count = b % (length - page + 1);
                    bitmap.set_run(PageIndex(page), count);
                    model.extend(page..page + count);
                }
                3 => {
                    let count = b % (length - page + 1);
                    bitmap.clear_run(PageIndex(page), count);
                    model.retain(|at| !(page..page + count).contains(at));
                }
                4 => {
                    bitmap.fill();
                    model = (0..length).collect();
                }
                5 => {
                    bitmap.forget();
                    model.clear();
                }
                6 => {
                    let most = usize::try_from(b % 8).expect("small");
                    for (word, bits) in bitmap.take_words().take(most) {
                        for (first, count) in runs(word, bits) {
                            taken.extend(first.0..first.0 + count);
                            model.retain(|at| !(first.0..first.0 + count).contains(at));
                            other.set_run(first, count);
                        }
                    }
                }
                _ => {
                    bitmap.take(&other);
                    taken.append(&mut model);
                }
            }
            prop_assert_eq!(pages(&bitmap), model.clone());
            prop_assert_eq!(pages(&other), taken.clone());
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            prop_assert_eq!(bitmap.is_empty(), model.is_empty());
            let listed: BTreeSet<u64> = bitmap.set_runs().flat_map(|(first, count)| first.0..first.0 + count).collect();
            prop_assert_eq!(&listed, &model);
            let clear: BTreeSet<u64> = bitmap.clear_runs().flat_map(|(first, count)| first.0..first.0 + count).collect();
            prop_assert_eq!(clear, (0..length).filter(|page| !model.contains(page)).collect::<BTreeSet<_>>());
        }
    }

    #[test]
    fn runs_are_the_set_bits_in_order(bits: u64, word in 0_usize..9) {
        let listed: Vec<u64> = runs(word, bits).flat_map(|(first, count)| first.0..first.0 + count).collect();
        let expected: Vec<u64> = (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit).collect();
        prop_assert_eq!(listed, expected);
        let starts: Vec<(PageIndex, u64)> = runs(word, bits).collect();
        prop_assert!(starts.windows(2).all(|pair| pair[0].0.0 + pair[0].1 < pair[1].0.0), "neighbours are one run");
    }
}

#[test]
fn a_full_bitmap_has_no_bit_beyond_its_last_page() {
    for pages in [1, 63, 64, 65, 128] {
        let bitmap = PageBitmap::full(pages);
        assert_eq!(bitmap.count(), pages);
        bitmap.merge([u64::MAX; 4]);
        assert_eq!(bitmap.count(), pages);
    }
    assert_eq!(PageBitmap::full(0).words().len(), 0);
}

#[test]
fn taking_words_empties_the_bitmap_and_passes_over_empty_ones() {
    let bitmap = PageBitmap::new(1000);
    for page in [3, 700, 999] {
        bitmap.set(PageIndex(page));
    }
    let taken: Vec<_> = bitmap.take_words().collect();
    assert_eq!(taken, [(0, 1 << 3), (10, 1 << 60), (15, 1 << 39)]);
    assert!(bitmap.is_empty());
}

#[test]
fn words_that_a_walk_has_not_returned_stay() {
    for bitmap in [PageBitmap::full(PAGES), made_full(PAGES)] {
        let first: Vec<_> = bitmap.take_words().take(3).collect();
        assert_eq!(first, [(0, u64::MAX), (1, u64::MAX), (2, u64::MAX)]);
        assert_eq!(bitmap.count(), PAGES - 3 * 64);
        assert_eq!(
            bitmap.take_words().map(|(_, bits)| u64::from(bits.count_ones())).sum::<u64>(),
            PAGES - 3 * 64
        );
        assert!(bitmap.is_empty());
    }
}

/// The same bits, but with memory for each.
fn made_full(pages: u64) -> PageBitmap {
    let bitmap = PageBitmap::new(pages);
    bitmap.merge(std::iter::repeat_n(u64::MAX, PageBitmap::new(pages).words().len()));
    bitmap
}

/// Three groups, the last of them not whole, and a leaf and a word that are not whole.
const PAGES: u64 = (2 * GROUP_WORDS as u64 + 3 * LEAF_WORDS as u64 + 5) * WORD + 7;

/// Whether no bit of the bitmap, and no part of it, has memory of its own.
fn is_unmade(bitmap: &PageBitmap) -> bool {
    bitmap.tree.groups.iter().all(|group| !matches!(group.view(), View::Made(_)))
}

#[test]
fn a_bitmap_of_terabytes_has_memory_only_for_bits_that_differ_from_their_neighbours() {
    // 64 TiB of pages of 4 KiB.
    let pages = 1 << 34;
    let bitmap = PageBitmap::new(pages);
    assert!(size_of_val(&*bitmap.tree.groups) <= 4 << 20, "{}", size_of_val(&*bitmap.tree.groups));
    bitmap.set(PageIndex(pages - 1));
    bitmap.set_run(PageIndex(1 << 20), 1 << 30);
    let made = bitmap.tree.groups.iter().filter(|group| matches!(group.view(), View::Made(_))).count();
    assert_eq!(made, 1, "only the part of the last page");
    assert_eq!(bitmap.count(), (1 << 30) + 1);
    bitmap.clear_run(PageIndex(0), pages);
    assert!(bitmap.is_empty());
    // Every run of clear bits is set as a whole: the rest of the part of a single page needs no more memory than the page.
    bitmap.set(PageIndex(5));
    for (first, count) in bitmap.clear_runs() {
        bitmap.set_run(first, count);
    }
    assert_eq!(bitmap.count(), pages);
    let leaves = |group: &Part<Group>| match group.view() {
        View::Made(group) => (0..GROUP_WORDS)
            .step_by(LEAF_WORDS)
            .filter(|word| matches!(group.leaf(*word).view(), View::Made(_)))
            .count(),
        _ => 0,
    };
    assert_eq!(bitmap.tree.groups.iter().map(leaves).sum::<usize>(), 2, "those of the two single pages");
}

#[test]
fn full_bitmap_is_walked_taken_and_merged_without_memory_for_its_bits() {
    let (bitmap, other) = (PageBitmap::full(PAGES), PageBitmap::new(PAGES));
    assert_eq!(bitmap.count(), PAGES);
    assert!(bitmap.set(PageIndex(PAGES - 1)), "it was set before");
    assert!(!other.clear(PageIndex(PAGES - 1)), "it was clear before");
    bitmap.take(&other);
    assert!(bitmap.is_empty());
    assert_eq!(other.count(), PAGES);
    assert_eq!(other.take_words().count() as u64, PAGES.div_ceil(WORD));
    assert!(other.is_empty());
    assert_eq!(other.clear_runs().map(|(_, count)| count).sum::<u64>(), PAGES);
    assert!(is_unmade(&bitmap) && is_unmade(&other));
}

#[test]
fn runs_over_whole_parts_are_what_single_pages_are() {
    let group = GROUP_WORDS as u64 * WORD;
    let leaf = LEAF_WORDS as u64 * WORD;
    for (first, count) in [
        (0, PAGES),
        (group - 1, group + 2),
        (1, group),
        (group, group),
        (2 * group, PAGES - 2 * group),
        (leaf - 1, 2 * leaf + 2),
        (leaf, leaf),
        (2 * group + 2 * leaf, PAGES - 2 * group - 2 * leaf),
    ] {
        let (set, clear) = (PageBitmap::new(PAGES), PageBitmap::full(PAGES));
        set.set_run(PageIndex(first), count);
        clear.clear_run(PageIndex(first), count);
        assert_eq!((set.count(), clear.count()), (count, PAGES - count));
        let inside = |page| (first..first + count).contains(&page);
        for page in [0, 1, first, group - 1, group, 2 * group, first + count - 1, PAGES - 1] {
            assert_eq!(set.contains(PageIndex(page)), inside(page), "page {page}");
            assert_eq!(clear.contains(PageIndex(page)), !inside(page), "page {page}");
        }
        let (listed, missing): (u64, u64) =
            (set.set_runs().map(|(_, count)| count).sum(), set.clear_runs().map(|(_, count)| count).sum());
        assert_eq!((listed, missing), (count, PAGES - count));
    }
}

/// A writer that sets a bit of a part which is all set must be seen by the thread that takes the part afterwards.
#[test]
fn no_write_is_lost_between_a_thread_that_sets_bits_and_one_that_takes_them() {
    let (bitmap, done) = (PageBitmap::full(PAGES), AtomicBool::new(false));
    let marks = [0, 63, 64, 5_000, PAGES - 1];
    let written: [AtomicU64; 5] = Default::default();
    let mut seen = [0; 5];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                for (page, written) in marks.iter().zip(&written) {
                    written.store(round, Ordering::Relaxed);
                    bitmap.set(PageIndex(*page));
                }
                if round % 16 == 0 {
                    bitmap.fill();
                }
            }
            done.store(true, Ordering::Release);
        });
        let mut last = false;
        loop {
            let taken = PageBitmap::new(PAGES);
            bitmap.take(&taken);
            for (at, page) in marks.iter().enumerate() {
                if taken.contains(PageIndex(*page)) {
                    seen[at] = written[at].load(Ordering::Relaxed);
                }
            }
            if last {
                break;
            }
            last = done.load(Ordering::Acquire);
        }
    });
    assert_eq!(seen, [ROUNDS; 5]);
}

const ROUNDS: u64 = if cfg!(miri) { 64 } else { 100_000 };

#[test]
fn next_set_page_is_the_first_from_there_on() {
    let pages = (2 << 17) + 70;
    let set = [0, 1, 63, 64, 200, 2048, 1 << 17, (1 << 17) + 3, pages - 1];
    let bitmap = PageBitmap::new(pages);
    set.iter().for_each(|page| bitmap.set_run(PageIndex(*page), 1));
    for from in set.iter().flat_map(|page| page.saturating_sub(2)..page + 3).chain([u64::MAX - 64, u64::MAX])
    {
        let expected = set.iter().copied().find(|page| *page >= from).map(PageIndex);
        assert_eq!(bitmap.next_set(PageIndex(from)), expected, "{from}");
    }
    let full = PageBitmap::full(pages);
    assert_eq!(full.next_set(PageIndex(77)), Some(PageIndex(77)));
    assert_eq!(full.next_set(PageIndex(pages)), None);
    assert_eq!(PageBitmap::new(pages).next_set(PageIndex(0)), None);
}
