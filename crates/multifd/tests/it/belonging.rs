//! Which channels belong to a migration: how many are expected, where they come from, and whose place is free.

use std::time::Duration;

use multifd::{
    ChannelCount, ReceiveOptions, Receiver,
    channel::{Connect, Link, Stop, memory},
    error::{Error, Usage, Violation},
    ram::PageSize,
    wire::{ChannelId, HeadBuffer, Initial, VmUuid},
};

use crate::kit::{TIMEOUT, spawn};

const SHORT: Duration = Duration::from_millis(100);

fn listening(options: ReceiveOptions) -> (Receiver, memory::MemoryConnector) {
    let (connector, listener) = memory::network(1 << 16);
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    (receiver, connector)
}

/// A channel that has sent its first SYNC.
fn channel(connector: &dyn Connect, id: u8) -> Box<dyn Link> {
    let mut link = connector.connect(&Stop::new(), TIMEOUT).expect("connected");
    let initial = Initial { uuid: VmUuid::NIL, id: ChannelId(id) }.encode();
    link.send(&[initial[..].into()]).expect("sent");
    link.send(&[HeadBuffer::new(PageSize::KIB_4).sync(id.into()).into()]).expect("sent");
    link
}

#[test]
fn a_sync_point_waits_for_as_many_channels_as_were_announced() {
    let (receiver, connector) = listening(ReceiveOptions::new());
    receiver.set_page_size(PageSize::KIB_4).expect("set");
    receiver.expect_channels(3).expect("first time");
    receiver.expect_channels(3).expect("the same again");
    assert!(matches!(receiver.expect_channels(4), Err(Error::Usage(Usage::UsedTwice))));
    let _first = channel(&connector, 0);
    let late = spawn("late", move || {
        std::thread::sleep(SHORT);
        [2, 1].map(|id| channel(&connector, id))
    });
    receiver.sync().expect("all come");
    assert_eq!(receiver.channels(), 3);
    drop(late.join().expect("no panic"));
}

#[test]
fn fewer_or_more_channels_than_were_announced_are_an_error_that_names_both_numbers() {
    let (receiver, connector) = listening(ReceiveOptions::new().channels_timeout(SHORT));
    receiver.expect_channels(3).expect("first time");
    let _first = channel(&connector, 1);
    let error = receiver.sync().expect_err("two are missing");
    let expected = Violation::TooFewChannels { announced: 3, met: 1 };
    assert!(matches!(error.kind(), Error::Violation(met) if *met == expected), "{error}");
    assert!(error.to_string().starts_with("the source announced 3 channels, but only 1 connected"), "{error}");

    for known_before in [false, true] {
        let (receiver, connector) = listening(ReceiveOptions::new());
        receiver.set_page_size(PageSize::KIB_4).expect("set");
        if known_before {
            receiver.expect_channels(2).expect("first time");
        }
        let _links = [0, 1, 2].map(|id| channel(&connector, id));
        let error = if known_before {
            receiver.sync().expect_err("one too many")
        } else {
            while receiver.channels() < 3 {
                std::thread::yield_now();
            }
            receiver.expect_channels(2).expect_err("one too many")
        };
        let expected = Violation::ChannelId { id: ChannelId(2), channels: 2 };
        assert!(matches!(error.kind(), Error::Violation(met) if *met == expected), "{error}");
    }
}

#[test]
fn an_announced_number_that_is_not_the_one_given_is_an_error_at_once() {
    for (given, announced) in [(2, 4), (0, 2), (2, 0)] {
        let receiver =
            Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(given)), Stop::new());
        let error = receiver.expect_channels(announced).expect_err("another number");
        let text = format!(
            "the source announced {announced} channels, but multifd-channels is {given} on this side"
        );
        assert!(error.to_string().starts_with(&text), "{error}");
        assert!(receiver.sync().is_err(), "it has stopped the migration");
    }
    let receiver = Receiver::new(ReceiveOptions::new().channels(ChannelCount::Exact(2)), Stop::new());
    receiver.expect_channels(2).expect("the number given");
}
