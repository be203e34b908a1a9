//! Channels that break, in a migration that continues without them.
//!
//! ```text
//! the source asks (round) ─▶ a channel breaks here, or there (lose) ─▶ sync waits for the end of its thread ─▶ round: it is named
//! ```
//!
//! From the first question to the switch to post-copy, the end of a channel's connection is no error, unless it is the last one. The
//! reply to the next question names it, and the source sends its pages again. A loss that no reply has named by the time when the
//! source does not ask any more is an error.

use std::{sync::Arc, time::Duration};

use super::{
    resumed::is_broken,
    shared::{Guard, Shared, State},
};
use crate::{
    channel::Wake,
    error::{Error, Result, Violation},
    sync_types::Instant,
    wire::ChannelId,
};

impl Shared {
    /// The source asks which channels are lost, at a sync point that was passed. From now on, one that breaks is lost.
    pub(super) fn round(&self) -> Vec<ChannelId> {
        let pages = self.pages_so_far();
        let mut state = self.lock();
        state.source.tolerant = true;
        state.source.confirmed = pages;
        let places = (0..=u8::MAX).map(ChannelId).zip(&mut state.roster.channels);
        let lost = places.filter_map(|(id, place)| {
            place.as_mut()?.lost.as_mut()?.reported = true;
            Some(id)
        });
        lost.collect()
    }

    /// The source has lost a channel: its connection is shut down.
    pub(super) fn lose(&self, id: ChannelId) -> Result<()> {
        let mut state = self.lock();
        let done = state.lose(id);
        drop(state);
        self.changed.notify_all();
        match done {
            Ok(wake) => {
                wake.iter().for_each(|waker| waker.wake());
                Ok(())
            }
            Err(why) => Err(self.stop.fail(Violation::LostChannel { id, why }.into())),
        }
    }

    /// Whether a channel whose thread ends, with this error or without one, is only lost.
    pub(super) fn is_lost(&self, id: ChannelId, number: u64, error: Option<&Error>) -> bool {
        let mut state = self.lock();
        let ends = state.life.sealed || state.life.stopped || state.life.source_closed;
        if ends || !state.tolerates() || error.is_some_and(|error| !is_broken(error)) {
            return false;
        }
        let is_last = state.is_last(id);
        let Some(place) = state.roster.place(id, number) else { return false };
        if is_last && place.lost.is_none() {
            return false;
        }
        place.lost.get_or_insert_default();
        true
    }

    /// Checks, at the end of RAM, that the source was informed of each channel whose pages may be missing.
    pub(super) fn check_confirmed(&self) -> Result<()> {
        let pages = self.pages_so_far();
        let state = self.lock();
        let unknown = state.unreported().filter(|_| state.tolerates() && pages != state.source.confirmed);
        drop(state);
        match unknown {
            None => Ok(()),
            Some(id) => Err(self.stop.fail(Violation::LostChannel { id, why: UNASKED }.into())),
        }
    }

    /// Waits for a change at a sync point that some channels have reached. If nothing moves for a while, the others are lost: their
    /// SYNC was sent before main's record, which is here.
    pub(super) fn wait_or_lose<'a>(&'a self, mut state: Guard<'a>, point: u64, begun: Instant) -> Guard<'a> {
        let left = self.context.stall_timer.left_of(SILENT, begun);
        if !left.is_zero() {
            return self.wait_timeout(state, left);
        }
        let silent = state.roster.channels.iter_mut().flatten().filter(|place| place.is_awaited(point));
        let wakes: Vec<_> = silent
            .filter_map(|place| {
                place.lost.get_or_insert_default();
                place.wake.clone()
            })
            .collect();
        drop(state);
        tracing::warn!(
            point,
            channels = wakes.len(),
            "channels are silent at a sync point: they are shut down"
        );
        wakes.iter().for_each(|waker| waker.wake());
        self.lock()
    }

    fn pages_so_far(&self) -> u64 {
        self.stats().iter().map(|channel| channel.normal + channel.zero).sum()
    }
}

impl State {
    /// Whether a channel that breaks is lost, and no error.
    fn tolerates(&self) -> bool {
        self.source.tolerant && !self.source.may_resume
    }

    /// Whether silent channels can be lost at this sync point: others have reached it.
    pub(super) fn may_lose_silent(&self, point: u64) -> bool {
        let mut places = self.roster.channels.iter().flatten();
        let is_awaited = places.clone().any(|place| place.is_awaited(point));
        self.tolerates() && is_awaited && places.any(|place| place.lost.is_none() && place.reached >= point)
    }

    /// Notes that the source has lost a channel. The result shuts it down.
    fn lose(&mut self, id: ChannelId) -> Result<Option<Arc<dyn Wake>>, &'static str> {
        if !self.source.tolerant {
            return Err(
                "the source reported it as broken before it asked whether this side continues without it",
            );
        }
        if self.source.may_resume {
            return Err("the source reported it as broken after the switch to post-copy");
        }
        let is_last = self.is_last(id);
        let Some(Some(place)) = self.roster.channels.get_mut(usize::from(id.0)) else {
            return Err("the source reported it as broken, but there is no such channel");
        };
        if place.lost.is_some_and(|loss| loss.named) {
            return Err("the source reported it as broken twice");
        }
        if is_last && place.lost.is_none() {
            return Err("the source reported it as broken, and it is the last one");
        }
        place.lost.get_or_insert_default().named = true;
        Ok(place.wake.clone())
    }

    /// Whether no channel but this one is left.
    fn is_last(&self, id: ChannelId) -> bool {
        let others = self.roster.channels.iter().enumerate().filter(|(other, _)| *other != usize::from(id.0));
        !others.filter_map(|(_, place)| place.as_ref()).any(|place| place.lost.is_none() && !place.ended)
    }

    /// A channel whose loss no reply has named.
    pub(super) fn unreported(&self) -> Option<ChannelId> {
        let mut places = (0..=u8::MAX).map(ChannelId).zip(&self.roster.channels);
        places.find_map(|(id, place)| place.as_ref()?.lost.filter(|loss| !loss.reported).map(|_| id))
    }
}

/// How long nothing may move on any connection while a SYNC is expected. A guest may be stopped meanwhile.
const SILENT: Duration = Duration::from_secs(3);
const UNASKED: &str =
    "pages followed after its connection broke, and the source did not ask which of its pages are missing";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ChannelCount, ReceiveOptions, Receiver,
        channel::{Context, Link, Stop, memory},
        compress::Method,
        ram::{BlockIndex, BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock, RamBlocks},
        wire::{HeadBuffer, Initial, VmUuid},
    };

    const PAGE: PageSize = PageSize::KIB_4;

    struct Source(Vec<Box<dyn Link>>);

    impl Source {
        /// A receiver whose source has passed the first sync point.
        fn begun(channels: u8) -> (Self, Receiver, Arc<RamBlocks>) {
            let options = ReceiveOptions::new().channels(ChannelCount::Exact(channels));
            let receiver = Receiver::new(options, Stop::new());
            let (context, mut source) = (Context::new(&Stop::new()), Self(Vec::new()));
            for id in (0..channels).map(ChannelId) {
                let (near, far) = memory::pair(1 << 16, &context, &context);
                source.0.push(Box::new(near));
                source.send(id.0, &Initial { uuid: VmUuid::default(), id }.encode());
                source.sync(id.0);
                receiver.add(Box::new(far));
            }
            let memory = Memory::Mapped(Mapping::anonymous(8 * 4096).expect("memory"));
            let block = RamBlock::new(name(), 8 * 4096, PAGE, memory).expect("a block");
            let blocks = Arc::new(RamBlocks::new(vec![block]).expect("distinct"));
            receiver.set_blocks(blocks.clone()).expect("the first time");
            receiver.sync().expect("all are there");
            (source, receiver, blocks)
        }

        fn send(&mut self, id: u8, mut bytes: &[u8]) {
            while let (false, Ok(sent)) = (bytes.is_empty(), self.0[usize::from(id)].send(&[bytes.into()])) {
                bytes = &bytes[sent..];
            }
        }

        fn sync(&mut self, id: u8) {
            let bytes = HeadBuffer::new(PAGE).sync(0).to_vec();
            self.send(id, &bytes);
        }

        /// A packet with this page, and with these of its bytes.
        fn page(&mut self, id: u8, page: u64, bytes: &[u8]) {
            let mut head = HeadBuffer::new(PAGE);
            let pages = [PageIndex(page)];
            let (normal, zero): (&[_], &[_]) = if bytes.is_empty() { (&[], &pages) } else { (&pages, &[]) };
            let length = if bytes.is_empty() { 0 } else { 4096 };
            let head = head.pages(Method::None.flags(), 0, &name(), normal, zero, length).to_vec();
            self.send(id, &head);
            self.send(id, bytes);
        }

        fn close(&mut self, id: u8) {
            self.0[usize::from(id)].close_send().expect("it is open");
        }
    }

    fn name() -> BlockName {
        BlockName::new("ram").expect("a name")
    }

    /// The page was never touched, so a zero page is not written unless something may be there.
    #[test]
    fn bytes_of_a_page_that_was_cut_are_cleared_by_a_zero_page() {
        let (mut source, receiver, blocks) = Source::begun(2);
        assert_eq!(receiver.round(), []);
        source.page(0, 3, &[7; 100]);
        source.close(0);
        source.sync(1);
        receiver.sync().expect("it does not wait for the lost one");
        assert_eq!(receiver.round(), [ChannelId(0)]);
        source.page(1, 3, &[]);
        source.sync(1);
        receiver.sync().expect("the other one comes");
        let (mut bytes, block) = ([1; 4096], blocks.block(BlockIndex(0)).expect("there"));
        block.slice(PageIndex(3), 1).expect("there").copy_to(&mut bytes);
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn a_channel_that_is_silent_where_others_have_reached_the_point_is_lost() {
        let (mut source, receiver, _) = Source::begun(3);
        receiver.round();
        source.sync(0);
        source.sync(2);
        receiver.sync().expect("it does not wait without end");
        assert_eq!(receiver.round(), [ChannelId(1)]);
    }

    #[test]
    fn what_cannot_be_true_about_a_lost_channel_is_refused() {
        let refused = |asked: bool, lost: &[u8], expected: &str| {
            let (_source, receiver, _) = Source::begun(2);
            if asked {
                receiver.round();
            }
            let (last, before) = lost.split_last().expect("one");
            for id in before {
                receiver.lose(ChannelId(*id)).expect("possible");
            }
            let error = receiver.lose(ChannelId(*last)).expect_err("refused").to_string();
            assert!(error.contains(expected), "{error}");
            assert!(receiver.stop().is_stopped());
        };
        refused(
            false,
            &[0],
            "cannot continue without channel 0: the source reported it as broken before it asked",
        );
        refused(
            true,
            &[2],
            "cannot continue without channel 2: the source reported it as broken, but there is no",
        );
        refused(true, &[255], "channel 255");
        refused(true, &[1, 1], "twice");
        refused(true, &[0, 1], "it is the last one");
        let (_source, receiver, _) = Source::begun(2);
        receiver.round();
        receiver.expect_resumed();
        let error = receiver.lose(ChannelId(1)).expect_err("refused").to_string();
        assert!(error.contains("after the switch to post-copy"), "{error}");
    }

    /// With one channel, or before the question, a channel that ends is an error as ever.
    #[test]
    fn a_channel_that_ends_is_an_error_if_it_is_the_last_one_or_nobody_has_asked() {
        for channels in [1, 2] {
            let (mut source, receiver, _) = Source::begun(channels);
            if channels == 1 {
                receiver.round();
            } else {
                source.sync(1);
            }
            source.close(0);
            let error = receiver.sync().expect_err("it has ended").to_string();
            assert!(error.contains("channel 0: the source closed the channel"), "{error}");
        }
    }

    #[test]
    fn a_source_that_sends_pages_after_a_break_and_does_not_ask_is_refused_at_the_end() {
        for asks in [false, true] {
            let (mut source, receiver, _) = Source::begun(2);
            receiver.round();
            source.close(0);
            source.page(1, 5, &[8; 4096]);
            source.sync(1);
            receiver.sync().expect("it does not wait for the lost one");
            if asks {
                assert_eq!(receiver.round(), [ChannelId(0)]);
                receiver.seal().expect("it was named");
                continue;
            }
            let error = receiver.seal().expect_err("pages may be missing").to_string();
            assert!(error.contains("cannot continue without channel 0: pages followed"), "{error}");
        }
    }
}
