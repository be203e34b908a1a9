//! Counts the passes of a source, as far as its stream shows them, and detects a source that does not switch over.
//!
//! A source of this library sends one section for each pass, and is known by its announcement of channels. A QEMU sends many
//! sections in a pass, in both sync modes, and its sync points are not those of the passes either: in legacy mode they end
//! sections, and in round mode one pass may have two (10.0.2). But it walks RAM upwards. So a pass has begun where a page is
//! before the last one, on main or [on a channel](multifd::RecvCounters::restarts). This number was equal to the source's
//! `dirty-sync-count` in passes of 2000 pages. Passes of very few pages may be missed.

use std::time::Duration;

use multifd::ram::PageIndex;

use crate::format::BlockIndex;

/// The passes of one source.
#[derive(Debug, Default)]
pub(crate) struct Passes {
    /// Each section is a pass.
    one_section_each: bool,
    sections: u64,
    /// The next section belongs to the same pass.
    is_split: bool,
    /// How often the pages on main began again.
    wraps: u64,
    last: Option<(BlockIndex, PageIndex)>,
}

impl Passes {
    /// The source is one of this library.
    pub(super) fn announced(&mut self) {
        self.one_section_each = true;
    }

    pub(super) fn are_announced(&self) -> bool {
        self.one_section_each
    }

    pub(super) fn section(&mut self) {
        self.sections += u64::from(!std::mem::take(&mut self.is_split));
    }

    /// A lost channel is named: the sync point of the pass is in a section of its own.
    pub(super) fn split(&mut self) {
        self.is_split = true;
    }

    /// A page arrived over main.
    pub(super) fn page(&mut self, block: BlockIndex, page: PageIndex) {
        let at = (block, page);
        self.wraps += u64::from(self.last.is_some_and(|last| at < last));
        self.last = Some(at);
    }

    /// The present pass, from 1; `None` before the first. The pages on the channels began again `restarts` times.
    pub(super) fn pass(&self, restarts: u64) -> Option<u64> {
        match self.sections {
            0 => None,
            sections if self.one_section_each => Some(sections),
            _ => Some(self.wraps.max(restarts) + 1),
        }
    }
}

/// Detects a source that could switch over and does not: passes follow each other fast, and are almost empty.
///
/// A source with a small `max-bandwidth` sends small sections as well, but waits after each: it was seen to send 10 in a
/// second, and a source that waits for SWITCHOVER_ACK more than 1000 (10.0.2).
#[derive(Debug, Default)]
pub(super) struct Idle {
    sections: u32,
    pages: u64,
    /// When the first of these sections began.
    since: Duration,
    reported: bool,
}

impl Idle {
    /// A section begins at the time `now`, and `pages` pages have arrived so far. Returns whether to report the source, once.
    pub(super) fn section(&mut self, pages: u64, now: Duration) -> bool {
        let few = pages - self.pages <= FEW;
        self.pages = pages;
        if !few || now.saturating_sub(self.since) > FAST {
            (self.sections, self.since) = (0, now);
            return false;
        }
        self.sections += 1;
        self.sections >= MANY && !std::mem::replace(&mut self.reported, true)
    }
}

/// The most pages of a section that is almost empty: a guest that works writes some even in a moment.
const FEW: u64 = 256;
/// This number of sections in a row is too many.
const MANY: u32 = 100;
/// The time limit for these sections.
const FAST: Duration = Duration::from_secs(5);

pub(super) const HINT: &str = "the source has sent 100 passes with almost no pages, and does not stop its guest: if capability \
                               switchover-ack is on there, it waits for an acknowledgement. Cancel, and either start the \
                               destination with switchover-ack (multifd receive --switchover-ack), or switch the capability off \
                               at the source (migrate_set_capability switchover-ack off). If it is off there, raise \
                               downtime-limit at the source";

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(passes: &mut Passes, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            passes.page(BlockIndex(0), PageIndex(page));
        }
    }

    /// A source with multifd off showed `pass 65` after 3 passes: its sections were counted.
    #[test]
    fn a_pass_without_channels_ends_where_the_pages_begin_again() {
        let mut passes = Passes::default();
        assert_eq!(passes.pass(0), None);
        for section in [0..10, 10..20, 20..30] {
            passes.section();
            pages(&mut passes, section);
        }
        assert_eq!(passes.pass(0), Some(1));
        passes.page(BlockIndex(1), PageIndex(0));
        assert_eq!(passes.pass(0), Some(1), "the next block is not the next pass");
        passes.section();
        pages(&mut passes, [3, 4, 9]);
        assert_eq!(passes.pass(0), Some(2));
    }

    /// It showed `pass 40` after 3 passes: the sync points of sections were counted.
    #[test]
    fn sections_of_a_qemu_are_no_passes_and_those_of_this_library_are() {
        let mut passes = Passes::default();
        for _ in 0..40 {
            passes.section();
        }
        assert_eq!(passes.pass(2), Some(3));
        passes.announced();
        assert_eq!(passes.pass(2), Some(40));
    }

    #[test]
    fn a_source_is_reported_once_after_100_fast_passes_with_few_pages() {
        let reports = |pages: u64, interval: u64| {
            let mut idle = Idle::default();
            let mut report =
                |section| idle.section(section * pages, Duration::from_millis(section * interval));
            (1..1000).filter(|section| report(*section)).collect::<Vec<u64>>()
        };
        assert_eq!(reports(FEW, 1), [u64::from(MANY)]);
        assert!(reports(FEW + 1, 1).is_empty(), "it sends pages");
        assert!(reports(0, 100).is_empty(), "its bandwidth is limited");
    }

    #[test]
    fn a_large_pass_in_between_begins_the_count_again() {
        let mut idle = Idle::default();
        let mut so_far = 0;
        for section in 0..500 {
            so_far += if section % 90 == 0 { FEW + 1 } else { 1 };
            assert!(!idle.section(so_far, Duration::from_millis(section)), "section {section}");
        }
    }
}
