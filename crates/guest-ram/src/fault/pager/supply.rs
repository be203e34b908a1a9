//! Where pages come from, and pieces of host pages that another side sends.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{error::PagerError, source::PageSource};
use crate::{PageBitmap, PageIndex, PageRun};

/// Where pages come from.
pub(crate) enum Supply {
    Loaded(Arc<dyn PageSource>),
    /// Another side sends them by itself, and sooner if they are requested.
    Pushed {
        requests: Arc<dyn RequestPages>,
        parts: Parts,
    },
}

/// What is placed.
#[derive(Clone, Copy)]
pub(super) enum Contents<'a> {
    Bytes(&'a [u8]),
    Zero,
}

/// What is placed, and whether its pages may be taken away.
pub(super) enum Placing<'a> {
    Own(&'a mut [u8]),
    Lent(Contents<'a>),
}

/// Requests pages from the side that sends them.
pub trait RequestPages: Send + Sync {
    /// A thread of the guest waits for these pages, which are one host page. Called once for each, from threads of the pager, and
    /// again for each by [`Pager::request_again`](super::Pager::request_again). It should return soon: other faults wait for it. A request that cannot be sent is
    /// dropped.
    fn request(&self, run: PageRun);
}

/// Host pages of which only pieces have arrived.
#[derive(Default)]
pub(crate) struct Parts(Mutex<BTreeMap<(usize, u64), Part>>);

struct Part {
    bytes: Vec<u8>,
    has: PageBitmap,
}

impl<'a> Contents<'a> {
    pub(super) fn piece(self, from: usize, len: usize) -> Self {
        match self {
            Self::Bytes(bytes) => Self::Bytes(bytes.get(from..from.saturating_add(len)).unwrap_or_default()),
            Self::Zero => Self::Zero,
        }
    }
}

impl Parts {
    /// Adds a piece of a host page. Returns the bytes of the host page if it is whole now.
    pub(super) fn add(
        &self,
        whole: PageRun,
        piece: PageRun,
        pushed: Contents<'_>,
        page: usize,
    ) -> Result<Option<Vec<u8>>, PagerError> {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (whole.block.0, whole.first.0);
        if !parts.contains_key(&key) && parts.len() == PARTS {
            let why = format!("pieces of more than {PARTS} host pages have arrived, and none of them whole");
            return Err(PagerError::Pushed { why });
        }
        let part = parts.entry(key).or_insert_with(|| Part {
            bytes: vec![0; usize::try_from(whole.count).unwrap_or(0).saturating_mul(page)],
            has: PageBitmap::new(whole.count),
        });
        let from = piece.first.0 - whole.first.0;
        part.has.set_run(PageIndex(from), piece.count);
        let start = usize::try_from(from).unwrap_or(0).saturating_mul(page);
        let len = usize::try_from(piece.count).unwrap_or(0).saturating_mul(page);
        let into = part.bytes.get_mut(start..start.saturating_add(len)).unwrap_or_default();
        match pushed {
            Contents::Bytes(bytes) => into.copy_from_slice(bytes),
            Contents::Zero => into.fill(0),
        }
        let is_whole = part.has.count() == whole.count;
        Ok(if is_whole { parts.remove(&key).map(|part| part.bytes) } else { None })
    }
}

/// Host pages that may be incomplete at the same time: each channel sends one after the other.
const PARTS: usize = 512;
