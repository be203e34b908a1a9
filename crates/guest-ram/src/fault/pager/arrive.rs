//! Pages that another side sends: requested loads wait for them, and others come by themselves.

use std::{collections::BTreeMap, time::Instant};

use super::{
    load::{Dropped, Load, LoadId, Stage, Task, Waits},
    pages::{Pages, State},
};
use crate::{PageIndex, PageRun};

impl Pages {
    /// A load is requested now, and stays so until its pages are [pushed](Self::arrives).
    pub(crate) fn requested(&self, id: LoadId) {
        if let Some(load) = self.lock().loads.get_mut(&id) {
            load.stage = Stage::Requested;
        }
    }

    /// The pages that were requested and have not come.
    pub(crate) fn all_requested(&self) -> Vec<PageRun> {
        let state = self.lock();
        let requested =
            state.loads.values().filter(|load| load.stage == Stage::Requested && !load.is_dropped());
        requested.map(|load| load.run).collect()
    }

    /// These pages, which are whole host pages, have arrived. Those that are missing become a load that the caller places;
    /// those that are there, or are being placed, are dropped from it. `None` if nothing is to be placed. The second value are the
    /// threads that wait for some of them.
    pub(super) fn arrives(&self, run: PageRun) -> Option<(Task, Waits)> {
        let mut state = self.lock();
        if state.is_ended {
            return None;
        }
        let State { walk, loads, .. } = &mut *state;
        let shape = walk.shape(run.block)?;
        let (mut dropped, mut waits, mut wanted) = (BTreeMap::new(), Waits::default(), false);
        for first in run.host_pages(shape.host_page) {
            let count = shape.host_page.min(shape.pages.saturating_sub(first));
            let page = PageRun { first: PageIndex(first), count, ..run };
            if walk.claim(page) {
                wanted = true;
                continue;
            }
            let waits_for_it = |load: &&mut Load| !load.is_arrival() && load.run.contains(&page);
            let Some(load) = loads.values_mut().find(waits_for_it) else {
                dropped.insert(first, Dropped::GivenUp);
                continue;
            };
            match load.dropped.insert(first, Dropped::GivenUp) {
                None => {}
                Some(Dropped::Removed) => _ = dropped.insert(first, Dropped::Removed),
                Some(Dropped::GivenUp) => {
                    dropped.insert(first, Dropped::GivenUp);
                    continue;
                }
            }
            wanted = true;
            waits.extend(&load.awaited);
        }
        loads.retain(|_, load| load.is_arrival() || !load.is_dropped());
        if !wanted {
            return None;
        }
        let for_fault = !waits.is_empty() && run.count <= shape.host_page;
        let stage = Stage::Running { since: Instant::now(), for_fault: false };
        let id = state.begin(run, Waits::default(), stage);
        if let Some(load) = state.loads.get_mut(&id) {
            load.dropped = dropped;
        }
        Some((Task { id, run, for_fault }, waits))
    }
}
