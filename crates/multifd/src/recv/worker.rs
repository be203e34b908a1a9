//! A channel's thread: it receives heads and payloads, one packet after the other.
//!
//! It owns its connection and its buffers. The pages of a packet and the head of the next one are received in one call:
//! pages where they belong, the head into the channel's buffer.

use std::sync::atomic::Ordering;

use super::{decode::Listed, packet_reader::PacketReader, place::Placer, shared::Shared, walk::Walk};
use crate::{
    channel::Link,
    error::{Error, Result, Unsupported, Violation, chain},
    sync_types::AtomicBool,
    wire::{COMMON_LEN, ChannelId, INITIAL_LEN, head_len},
};

/// Runs a channel after its initial packet, on connection `number`. An error fails the whole migration, unless all of RAM
/// has arrived, or the channel does not belong to the migration.
pub(super) fn run(id: ChannelId, number: u64, shared: &Shared, link: Box<dyn Link>) {
    tracing::debug!(channel = id.0, "multifd_recv_thread_start");
    let mut packets = 0;
    let consumed = consume(id, number, shared, link, &mut packets);
    if shared.is_lost(id, number, consumed.as_ref().err()) {
        let error = ended(consumed);
        tracing::warn!(channel = id.0, %error, "a channel is broken; the migration continues without it");
    } else if shared.breaks_off(id, number, consumed.as_ref().err()) {
        let error = ended(consumed);
        tracing::debug!(channel = id.0, %error, "a channel is broken, and the source may return");
    } else if let Err(error) = consumed {
        // Pages after the end may be newer than the received ones, so this is not an ordinary end of a channel.
        // The same applies to device state that arrives here.
        let lost = matches!(
            error.kind(),
            Error::Violation(Violation::PagesAfterEnd { .. })
                | Error::Unsupported(Unsupported::DeviceState { .. })
        );
        if packets == 0 && shared.is_left_over(id, number, &error) {
            tracing::warn!(channel = id.0, %error, "a channel without a main connection has ended");
        } else if shared.is_sealed() && !lost {
            tracing::debug!(channel = id.0, %error, "a channel failed after all of RAM has arrived");
        } else {
            tracing::debug!(channel = id.0, %error, "multifd_recv_terminate_threads");
            shared.stop.fail(error.on_channel(id));
        }
    }
    shared.ended(id, number, packets);
    tracing::debug!(channel = id.0, "multifd_recv_thread_end");
}

/// Why a channel has ended.
fn ended(consumed: Result<()>) -> String {
    consumed.err().map_or_else(|| "the source has closed it".to_owned(), |error| chain(&error).to_string())
}

fn consume(
    id: ChannelId,
    number: u64,
    shared: &Shared,
    link: Box<dyn Link>,
    packets: &mut u64,
) -> Result<()> {
    // The page size is known after main has connected, which may never happen. This part of the head does not depend on it,
    // so an end of the connection is noticed before.
    let mut reader = PacketReader::new(link);
    if !reader.at_least(COMMON_LEN)? && (reader.is_empty() || !shared.is_admitted(id, number)) {
        return Ok(());
    }
    let Some(page_size) = shared.wait_admitted(id, number) else { return Ok(()) };
    let head_len = head_len(page_size);
    reader.lengthen(head_len);
    let counters = shared.counters.get(usize::from(id.0)).expect(ADMITTED);
    counters.add_bytes(INITIAL_LEN as u64);
    let mut listed = Listed::new(page_size);
    let (mut placer, mut walk) = (Placer::new(shared.decoder_memory.clone()), Walk::default());
    let mut greatest = 0;
    while let Some(head) = reader.head().map_err(|error| error.at(format_args!("packet {packets}")))? {
        let in_packet = |error: Error| error.at(format_args!("packet {packets}"));
        let arrived = shared.arrived.get();
        let blocks = arrived.map(|arrived| &**arrived.blocks());
        listed.decode(head, &shared.method, blocks).map_err(in_packet)?;
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
            placer.place(&mut reader, &listed, arrived).map_err(in_packet)?;
            let restarts = walk.packet(listed.block, listed.normal.iter().chain(&listed.zero).copied());
            shared.restarts.fetch_max(restarts, Ordering::Relaxed);
        }
        let bytes = (head_len + listed.payload_len) as u64;
        counters.add_packet(listed.normal.len(), listed.zero.len(), bytes);
        *packets += 1;
        greatest = greatest.max(listed.packet_num);
        shared.context.stall_timer.moved();
        if listed.sync {
            shared.reach(id, number, *packets, greatest)?;
        }
    }
    Ok(())
}

/// `admit` refuses every id that is not less than the number of channels.
const ADMITTED: &str = "there is one for each channel";

/// Marks a channel as writing to guest memory, as long as the mark lives.
pub(super) struct Filling<'a>(&'a AtomicBool);

impl<'a> Filling<'a> {
    /// Sequentially consistent, as is `Shared::seal`: either this sees the seal, or the seal sees this.
    pub(super) fn begin(id: ChannelId, shared: &'a Shared, listed: &Listed) -> Result<Self> {
        let flag = shared.filling.get(usize::from(id.0)).expect(ADMITTED);
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
            if let Ok(found) = sealed {
                assert_eq!(page.load(Ordering::Relaxed), found, "a page was written behind the seal");
            }
        }
    }
}
