//! A channel's thread: heads and payloads come off the connection, one packet after the other.
//!
//! It owns its connection and its buffers. The pages of a packet and the head of the next one arrive in one call:
//! pages where they belong, the head in the channel's buffer.

use std::{io, sync::atomic::Ordering};

use arrayvec::ArrayVec;

use super::{Shared, decode::Listed, fill::Filler};
use crate::{
    channel::{Link, recv_at_least},
    error::{Error, Result, Unsupported, Violation},
    ram::{MAX_PARTS, PartMut},
    sync_types::AtomicBool,
    wire::{COMMON_LEN, ChannelId, DEVICE_STATE_LEN, DeviceState, INITIAL_LEN, head_len},
};

/// The life of a channel after its initial packet, on connection `number`. An error ends the whole migration, unless
/// everything has come, or the channel does not belong to it.
pub(super) fn run(id: ChannelId, number: u64, shared: &Shared, link: Box<dyn Link>) {
    tracing::debug!(channel = id.0, "multifd_recv_thread_start");
    let mut packets = 0;
    if let Err(error) = consume(id, number, shared, link, &mut packets) {
        // Pages after the end may be newer than what is kept: that is no way to take leave.
        // Nor is a device whose state comes here.
        let lost = matches!(
            error.kind(),
            Error::Violation(Violation::PagesAfterEnd { .. })
                | Error::Unsupported(Unsupported::DeviceState { .. })
        );
        if packets == 0 && shared.is_left_over(id, number, &error) {
            tracing::warn!(channel = id.0, %error, "a channel that no main connection goes with has ended");
        } else if shared.is_sealed() && !lost {
            tracing::debug!(channel = id.0, %error, "an error after everything has come");
        } else {
            tracing::debug!(channel = id.0, %error, "multifd_recv_terminate_threads");
            shared.stop.fail(error.on_channel(id));
        }
    }
    shared.ended(id, number, packets);
    tracing::debug!(channel = id.0, "multifd_recv_thread_end");
}

fn consume(
    id: ChannelId,
    number: u64,
    shared: &Shared,
    link: Box<dyn Link>,
    packets: &mut u64,
) -> Result<()> {
    // The page size comes from main, which may never come: whatever it is, this much is a part of the head, so an end
    // is noticed meanwhile.
    let mut inlet = Inlet { link, head: vec![0; COMMON_LEN].into(), have: 0 };
    if !inlet.at_least(COMMON_LEN)? && (inlet.have == 0 || !shared.is_admitted(id, number)) {
        return Ok(());
    }
    let Some(page_size) = shared.wait_admitted(id, number) else { return Ok(()) };
    inlet.lengthen(head_len(page_size));
    let counters = &shared.counters[usize::from(id.0)];
    counters.add_bytes(INITIAL_LEN as u64);
    let mut listed = Listed::new(page_size);
    let mut filler = Filler::default();
    let mut greatest = 0;
    while inlet.head().map_err(|error| error.at(format_args!("packet {packets}")))? {
        let in_packet = |error: Error| error.at(format_args!("packet {packets}"));
        let arrived = shared.arrived.get();
        let blocks = arrived.map(|arrived| &**arrived.blocks());
        listed.decode(&inlet.head, &shared.method, blocks).map_err(in_packet)?;
        inlet.have = 0;
        tracing::trace!(
            channel = id.0,
            packet_num = listed.packet_num,
            normal = listed.normal.len(),
            zero = listed.zero.len(),
            next_packet_size = listed.payload_len,
            sync = listed.sync,
            "multifd_recv"
        );
        if let Some(arrived) = arrived.filter(|_| listed.has_pages()) {
            let _filling = Filling::begin(id, shared, &listed).map_err(in_packet)?;
            filler.fill(&mut inlet, &listed, arrived).map_err(in_packet)?;
        }
        let bytes = (inlet.head.len() + listed.payload_len) as u64;
        counters.add_packet(listed.normal.len(), listed.zero.len(), bytes);
        *packets += 1;
        greatest = greatest.max(listed.packet_num);
        shared.attention.beat();
        if listed.sync {
            shared.reach(id, *packets, greatest)?;
        }
    }
    Ok(())
}

/// The connection, and what has come of the next head.
pub(super) struct Inlet {
    link: Box<dyn Link>,
    head: Box<[u8]>,
    have: usize,
}

impl Inlet {
    /// Completes the head. `false` if the peer has closed at a packet's border.
    fn head(&mut self) -> Result<bool> {
        let begun = self.at_least(COMMON_LEN)?;
        // The head of a device-state packet is shorter: waiting for more of it could be for ever.
        if begun
            && self.head.first_chunk().is_some_and(DeviceState::is_begun_by)
            && self.at_least(DEVICE_STATE_LEN)?
            && let Some(head) = self.head.first_chunk()
        {
            let DeviceState { device, instance, .. } = DeviceState::decode(head)?;
            return Err(Unsupported::DeviceState { device, instance }.into());
        }
        if begun && self.at_least(self.head.len())? {
            Ok(true)
        } else if self.have == 0 {
            Ok(false)
        } else {
            let (expected, met) = (self.head.len() as u64, self.have as u64);
            Err(Violation::Cut { what: "a packet head", expected, met }.into())
        }
    }

    /// Makes room for whole heads.
    fn lengthen(&mut self, head_len: usize) {
        let mut head = std::mem::take(&mut self.head).into_vec();
        head.resize(head_len, 0);
        self.head = head.into();
    }

    /// Receives until so many bytes of the head are there. `false` if the peer closes before.
    fn at_least(&mut self, bytes: usize) -> Result<bool> {
        if self.have < bytes {
            let room = &mut self.head[self.have..];
            let received = recv_at_least(&mut *self.link, &mut [PartMut::from(room)], bytes - self.have)
                .map_err(|error| self.broken(error))?;
            self.have += received;
        }
        Ok(self.have >= bytes)
    }

    /// Receives `length` bytes of payload into `parts`, and as much of the next head as is there.
    pub(super) fn payload(&mut self, parts: ArrayVec<PartMut<'_>, MAX_PARTS>, length: usize) -> Result<()> {
        let received = {
            let mut parts = parts;
            parts.push(PartMut::from(&mut *self.head));
            recv_at_least(&mut *self.link, &mut parts, length)
        };
        let received = received.map_err(|error| self.broken(error))?;
        if received < length {
            let (expected, met) = (length as u64, received as u64);
            return Err(Violation::Cut { what: "a packet's pages", expected, met }.into());
        }
        self.have = received - length;
        Ok(())
    }

    fn broken(&self, error: io::Error) -> Error {
        Error::io(format!("receive from {}", self.link.peer()), error)
    }
}

/// Marks a channel as writing to guest memory, for as long as it lives.
pub(super) struct Filling<'a>(&'a AtomicBool);

impl<'a> Filling<'a> {
    /// Sequentially consistent, as is `Shared::seal`: either this sees the seal, or the seal sees this.
    pub(super) fn begin(id: ChannelId, shared: &'a Shared, listed: &Listed) -> Result<Self> {
        let flag = &shared.filling[usize::from(id.0)];
        flag.store(true, Ordering::SeqCst);
        let filling = Self(flag);
        if shared.is_sealed() {
            let pages = u32::try_from(listed.normal.len() + listed.zero.len()).unwrap_or(u32::MAX);
            return Err(Violation::PagesAfterEnd { pages }.into());
        }
        Ok(filling)
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
        thread::{spawn, yield_now},
    };

    use super::*;
    use crate::{ChannelCount, ReceiveOptions, Receiver, channel::Stop, ram::PageSize};

    /// It was not seen to fail with weaker orders, not under Miri either: see `docs/develop/concurrency.md`.
    #[test]
    fn a_mark_and_the_seal_that_are_set_at_once_do_not_miss_each_other() {
        for round in 0..if cfg!(miri) { 4 } else { 400 } {
            let options = ReceiveOptions::new().channels(ChannelCount::Exact(1));
            let receiver = Receiver::new(options, Stop::new());
            let (shared, page) = (receiver.shared.clone(), Arc::new(AtomicU64::new(0)));
            let filling = spawn({
                let (shared, page) = (shared.clone(), page.clone());
                move || {
                    let mark = Filling::begin(ChannelId(0), &shared, &Listed::new(PageSize::KIB_4));
                    // Ordered by nothing but the mark, as guest memory is.
                    mark.map(|_mark| {
                        yield_now();
                        page.store(1, Ordering::Relaxed);
                    })
                    .is_ok()
                }
            });
            if round % 2 == 0 {
                // Else Miri seldom lets the mark be set first.
                yield_now();
            }
            let sealed = shared.seal().map(|()| page.load(Ordering::Relaxed));
            filling.join().expect("no panic");
            if let Ok(met) = sealed {
                assert_eq!(page.load(Ordering::Relaxed), met, "a page was written behind the seal");
            }
        }
    }
}
