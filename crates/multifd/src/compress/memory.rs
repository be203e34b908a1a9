//! The memory that the decoders of all channels may take together for their windows.
//!
//! A decoder keeps a window of what it made, as large as the source's frame asks for. One channel asks for little; 255
//! channels that each ask for the most would take gigabytes. So a window is reserved here before the library makes it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::error::Unsupported;

/// What is left for windows, of one migration.
#[derive(Clone, Debug)]
pub(crate) struct DecoderMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// `None` is no limit.
    limit: Option<u64>,
    /// Bytes that are reserved. Relaxed: it orders nothing, and each exchange finds the newest value.
    reserved: AtomicU64,
}

impl DecoderMemory {
    pub(crate) fn new(limit: Option<u64>) -> Self {
        Self(Arc::new(Shared { limit, reserved: AtomicU64::new(0) }))
    }

    /// Reserves `bytes` until the result is dropped.
    ///
    /// # Errors
    /// [`Unsupported::DecoderMemory`] if all windows together exceed the limit.
    #[cfg_attr(not(feature = "zstd"), allow(dead_code, reason = "the only method with windows that count"))]
    pub(crate) fn reserve(&self, bytes: u64) -> Result<Reserved, Unsupported> {
        let before = self.0.reserved.fetch_add(bytes, Ordering::Relaxed);
        let reserved = Reserved { of: self.clone(), bytes };
        let needed = before.saturating_add(bytes);
        match self.0.limit {
            Some(limit) if needed > limit => Err(Unsupported::DecoderMemory { limit, needed, window: bytes }),
            _ => Ok(reserved),
        }
    }
}

/// Memory that a decoder takes.
#[derive(Debug)]
#[cfg_attr(not(feature = "zstd"), allow(dead_code, reason = "the only method with windows that count"))]
pub(crate) struct Reserved {
    of: DecoderMemory,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.of.0.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_together_reach_the_limit_and_no_further() {
        let memory = DecoderMemory::new(Some(100));
        let first = memory.reserve(60).expect("there is room");
        let _second = memory.reserve(40).expect("just enough");
        let refused = memory.reserve(1).expect_err("one byte beyond");
        assert_eq!(refused, Unsupported::DecoderMemory { limit: 100, needed: 101, window: 1 });
        drop(first);
        // What was refused is not counted.
        memory.reserve(60).expect("there is room again");
        DecoderMemory::new(None).reserve(u64::MAX).expect("without limit");
    }
}
