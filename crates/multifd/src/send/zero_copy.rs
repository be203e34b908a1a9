//! Batches whose pages the system sends directly from guest memory.
//!
//! ```text
//! carry ── pages ──▶ ZeroCopy::send_in_place ──▶ pending calls ──completed──▶ the batch goes back
//! ```
//!
//! Up to [`DEPTH`] batches of a channel are pending. The channel waits for the oldest before the next batch, and for
//! all of them before a SYNC. The guest continues to write to the memory. Such a write may or may not be sent; in
//! either case its page is dirty again.

use std::{
    collections::VecDeque,
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    io::Errno,
    process::{Resource, getrlimit},
    thread::{CapabilitySet, capabilities},
};

use crate::{
    batch::Batch,
    channel::{Link, ZeroCopy},
    ram::{Part, advance},
};

/// Up to 4 MiB per channel, half of what most systems let a process lock.
pub(super) const DEPTH: usize = 8;

/// State shared by the channels. Relaxed: it only shows whether to try again, and orders nothing.
#[derive(Default)]
pub(super) struct Shared {
    /// The number of pending calls.
    calls: AtomicU64,
    /// The number of calls that were ever completed.
    completed: AtomicU64,
}

pub(super) struct InFlight<'a> {
    calls: u64,
    completed: u64,
    /// The number of calls that the system has copied, at the last SYNC and now.
    copied: [u64; 2],
    /// Whether pages were copied here since the last SYNC.
    copied_here: bool,
    /// The pending batches, each with the number of calls that had been made when it was sent.
    batches: VecDeque<(u64, Batch)>,
    shared: &'a Shared,
}

impl<'a> InFlight<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        let batches = VecDeque::with_capacity(DEPTH + 1);
        Self { calls: 0, completed: 0, copied: [0; 2], copied_here: false, batches, shared }
    }

    /// Sends all bytes of `parts`.
    ///
    /// # Errors
    /// If the connection is broken, or the system locks not even this much memory.
    pub(super) fn send(&mut self, link: &mut dyn Link, mut parts: &mut [Part<'_>]) -> io::Result<()> {
        while parts.iter().any(|part| part.len() > 0) {
            // Counted before, so that a channel whose call is refused in the meantime knows the reason.
            let before = self.shared.completed.load(Ordering::Relaxed);
            self.shared.calls.fetch_add(1, Ordering::Relaxed);
            self.calls += 1;
            let sent = of(link)?.send_in_place(parts);
            if !matches!(sent, Ok(1..)) {
                self.calls -= 1;
                self.shared.calls.fetch_sub(1, Ordering::Relaxed);
            }
            let sent = match sent {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {
                    if self.completed < self.calls {
                        self.wait(link, self.completed + 1)?;
                        continue;
                    }
                    if self.shared.calls.load(Ordering::Relaxed) == 0 {
                        if self.shared.completed.load(Ordering::Relaxed) == before {
                            return Err(too_little());
                        }
                        // There was little memory to lock at the call, and there is more now.
                        continue;
                    }
                    // Other channels have locked all the memory that may be locked.
                    self.copied_here = true;
                    link.send(parts)?
                }
                sent => sent?,
            };
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            parts = advance(parts, sent);
        }
        Ok(())
    }

    /// Records that pages were sent with a copy.
    pub(super) fn copied(&mut self) {
        self.copied_here = true;
    }

    /// Takes a batch that was sent, and returns one that the system has completed.
    pub(super) fn carried(&mut self, link: &mut dyn Link, batch: Batch) -> io::Result<Option<Batch>> {
        self.batches.push_back((self.calls, batch));
        if self.batches.len() <= DEPTH {
            return Ok(None);
        }
        let Some((calls, batch)) = self.batches.pop_front() else { return Ok(None) };
        self.wait(link, calls)?;
        Ok(Some(batch))
    }

    /// Waits until the system has completed everything. Returns whether some of it was copied since the last time.
    pub(super) fn settle(&mut self, link: &mut dyn Link) -> io::Result<bool> {
        self.wait(link, self.calls)?;
        let [before, now] = self.copied;
        self.copied = [now; 2];
        Ok(std::mem::take(&mut self.copied_here) || now > before)
    }

    fn wait(&mut self, link: &mut dyn Link, calls: u64) -> io::Result<()> {
        if self.completed < calls {
            let (completed, copied) = of(link)?.completed(calls)?;
            let more = completed - self.completed;
            self.shared.completed.fetch_add(more, Ordering::Relaxed);
            self.shared.calls.fetch_sub(more, Ordering::Relaxed);
            (self.completed, self.copied[1]) = (completed, copied);
        }
        Ok(())
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.shared.calls.fetch_sub(self.calls - self.completed, Ordering::Relaxed);
    }
}

/// The zero-copy interface of the connection.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if it has none.
pub(super) fn of(link: &mut dyn Link) -> io::Result<&mut dyn ZeroCopy> {
    link.zero_copy().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// Checks that the process may lock the pages of at least one packet.
///
/// # Errors
/// [`io::ErrorKind::OutOfMemory`], with the limit.
pub(super) fn check_limit() -> io::Result<()> {
    // A process with the capability to lock memory has no limit. If the capabilities cannot be read, the first send
    // shows it.
    let bound = capabilities(None).is_ok_and(|sets| !sets.effective.contains(CapabilitySet::IPC_LOCK));
    let limit = getrlimit(Resource::Memlock).current;
    if bound && limit.is_some_and(|limit| limit < PACKET) { Err(too_little()) } else { Ok(()) }
}

fn too_little() -> io::Error {
    let limit = getrlimit(Resource::Memlock).current;
    let limit = limit.map_or_else(|| "without bound".into(), |bytes| format!("{} KiB", bytes >> 10));
    let text = format!(
        "zero-copy-send cannot lock enough memory: the limit of locked memory (RLIMIT_MEMLOCK, `ulimit -l`) is {limit}; a \
         packet needs up to {} KiB and a channel 4 MiB; raise the limit, or switch zero-copy-send off",
        PACKET >> 10
    );
    io::Error::new(io::ErrorKind::OutOfMemory, text)
}

/// The pages of a packet, plus one page at either end.
const PACKET: u64 = (512 << 10) + (8 << 10);
