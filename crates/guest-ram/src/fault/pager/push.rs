//! Pages that another side sends by itself: they are pushed into the pager, and requested if a thread of the guest waits.
//!
//! ```text
//! fault ─▶ Requested ─▶ RequestPages ═▶ other side ═▶ push ─▶ Pages::arrives ─▶ guest memory
//!                                          its walk ─▶ push ─┘      └─ what is there already is dropped
//! ```

use std::sync::Arc;

use super::{
    Pager, PagerError, PagerOptions,
    supply::{Contents, Parts, Placing, RequestPages, Supply},
    walk,
    work::Shared,
};
use crate::{PageBitmap, PageIndex, PageRun, fault::Armed};

impl Pager {
    /// Starts to serve memory whose missing pages another side sends by itself: they are [pushed](Self::push). `missing` has the
    /// pages of each block that will come, in the order of the blocks; all others are zero where memory has none. `requests` is
    /// called for each host page that a thread waits for. Nothing is prefetched.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn pushed(
        armed: Armed,
        missing: &[PageBitmap],
        requests: Arc<dyn RequestPages>,
        options: PagerOptions,
    ) -> Result<Self, PagerError> {
        let contents = |region: &super::Region| {
            let pages = PageBitmap::new(region.pages);
            for (first, count) in missing.get(region.block.0).into_iter().flat_map(PageBitmap::set_runs) {
                let end = (first.0 + count).min(region.pages);
                if first.0 < end {
                    pages.set_run(first, end - first.0);
                }
            }
            Ok(Some(pages))
        };
        let walk = |regions: &[super::Region], options: &PagerOptions| walk(regions, contents, options);
        let supply = Supply::Pushed { requests, parts: Parts::default() };
        Self::begin(armed, walk, supply, options.prefetch_threads(0))
    }

    /// Places these pages, if they are missing, and wakes the threads that wait for them. Pages that are there stay as they are, so it
    /// does no harm if a page comes twice. Pieces of a host page are kept until all of it has arrived. Waits while memory has run out,
    /// if the [judge](PagerOptions::judge) decides so. After the end of the pager nothing is placed.
    ///
    /// # Errors
    /// [`PagerError::Pushed`], and as the system fails.
    pub fn push(&self, run: PageRun, bytes: &[u8]) -> Result<(), PagerError> {
        self.shared.push(run, Contents::Bytes(bytes))
    }

    /// Does the same with pages of zeros.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_zero(&self, run: PageRun) -> Result<(), PagerError> {
        self.shared.push(run, Contents::Zero)
    }

    /// Requests once more what threads wait for: the other side has returned, and knows no earlier request.
    pub fn request_again(&self) {
        if let Supply::Pushed { requests, .. } = &self.shared.source {
            self.shared.pages.all_requested().into_iter().for_each(|run| requests.request(run));
        }
    }
}

impl Shared {
    /// For a model, which has no pager.
    #[cfg(shuttle)]
    pub(super) fn push_bytes(&self, run: PageRun, bytes: &[u8]) -> Result<(), PagerError> {
        self.push(run, Contents::Bytes(bytes))
    }

    fn push(&self, run: PageRun, pushed: Contents<'_>) -> Result<(), PagerError> {
        let refused = |why: String| Err(PagerError::Pushed { why });
        let Supply::Pushed { parts, .. } = &self.source else {
            return refused("this pager loads its pages".to_owned());
        };
        let Some(region) = self.region(run.block) else {
            return refused(format!("block {} is not armed", run.block.0));
        };
        let page = usize::try_from(region.page).unwrap_or(usize::MAX);
        if run.count == 0 || run.end() > region.pages {
            return refused(format!(
                "pages {} to {} are not in block {:?}",
                run.first.0,
                run.end(),
                region.name
            ));
        }
        if let Contents::Bytes(bytes) = pushed
            && bytes.len() as u64 != run.count * region.page
        {
            return refused(format!("{} bytes are not {} pages", bytes.len(), run.count));
        }
        let host_page = region.shape().host_page;
        if host_page == 1 {
            return self.arrived(run, pushed);
        }
        let mut first = run.first.0;
        while first < run.end() {
            let host_first = first - first % host_page;
            let host_end = (host_first + host_page).min(region.pages);
            // As many whole host pages as there are, or a piece of one.
            let whole = match run.end() {
                end if end == region.pages => end,
                end => end - end % host_page,
            };
            let end = if first == host_first && whole > first { whole } else { host_end.min(run.end()) };
            let piece = PageRun { first: PageIndex(first), count: end - first, ..run };
            let skipped = usize::try_from(first - run.first.0).unwrap_or(usize::MAX).saturating_mul(page);
            let pushed =
                pushed.piece(skipped, usize::try_from(piece.count).unwrap_or(0).saturating_mul(page));
            if first == host_first && whole > first {
                self.padded(piece, pushed, host_page, page)?;
            } else {
                let whole = PageRun { first: PageIndex(host_first), count: host_end - host_first, ..run };
                if let Some(bytes) = parts.add(whole, piece, pushed, page)? {
                    self.padded(whole, Contents::Bytes(&bytes), host_page, page)?;
                }
            }
            first = end;
        }
        Ok(())
    }

    /// Places whole host pages. The last one of a block may be longer than the block.
    fn padded(
        &self,
        run: PageRun,
        pushed: Contents<'_>,
        host_page: u64,
        page: usize,
    ) -> Result<(), PagerError> {
        let Contents::Bytes(bytes) = pushed else { return self.arrived(run, Contents::Zero) };
        let missing = usize::try_from(run.count.next_multiple_of(host_page) - run.count).unwrap_or(0) * page;
        if missing == 0 {
            return self.arrived(run, Contents::Bytes(bytes));
        }
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len() + missing, 0);
        self.arrived(run, Contents::Bytes(&whole))
    }

    fn arrived(&self, run: PageRun, contents: Contents<'_>) -> Result<(), PagerError> {
        let Some((task, waits)) = self.pages.arrives(run) else { return Ok(()) };
        self.place(task, run, Placing::Lent(contents))?;
        let (mut all, _) = self.pages.ended(task.id);
        all.extend(&waits);
        self.counts.answered(all);
        Ok(())
    }
}
