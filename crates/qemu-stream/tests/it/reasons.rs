//! A source is told why its destination refuses, wherever that happens and whoever refuses.

use std::{panic, thread, time::Duration};

use multifd::{
    Callback, ChannelCount, Error, Fault, ReceiveOptions,
    channel::Stop,
    error::chain,
    live::MigrateOptions,
    ram::{NeverDirty, RamBlocks},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    format::MachineType,
    incoming::Expected,
};

use crate::hops::kit::{RAM, Told, as_announced, block, blocks, departure, listening};

/// Where and how a destination ends a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    OtherType,
    OtherChannels,
    MakeFails,
    MakePanics,
    AnnouncedRefused,
    OtherBlocks,
    Refused,
    Dropped,
    Panicked,
    Cancelled,
}

fn arrive(arrival: Arrival, ends: Ends, stop: &Stop) -> Result<(), Error> {
    let why = || Error::text("expected a counter of version 2");
    match ends {
        Ends::OtherType | Ends::OtherChannels => arrival.announced().map(drop),
        Ends::MakeFails => arrival.load(|_, _| Err(why())).map(drop),
        Ends::MakePanics => {
            let load = || arrival.load(|_, _| panic::resume_unwind(Box::new("as told")));
            panic::catch_unwind(panic::AssertUnwindSafe(load)).map_err(|_| why())?.map(drop)
        }
        Ends::AnnouncedRefused => Err(arrival.announced()?.refuse(why())),
        Ends::OtherBlocks => arrival.load(|_, _| Ok(RamBlocks::new(vec![block("low", 64)])?)).map(drop),
        Ends::Refused => Err(arrival.load(as_announced)?.refuse(why())),
        Ends::Dropped => arrival.load(as_announced).map(drop),
        Ends::Panicked => {
            let pending = arrival.load(as_announced)?;
            let panicked = panic::catch_unwind(panic::AssertUnwindSafe(move || {
                let _pending = pending;
                // Without the message of the panic in the output of the test.
                panic::resume_unwind(Box::new("as told"))
            }));
            panicked.map_err(|_| why())
        }
        Ends::Cancelled => {
            let pending = arrival.load(as_announced)?;
            stop.cancel();
            pending.confirm().map(drop)
        }
    }
}

/// Migrates to a destination that ends like this. Returns the source's error.
fn told(ends: Ends, channels: u8, sends: bool) -> Error {
    let (listener, address) = listening();
    let arriving = thread::spawn(move || {
        let machine = if ends == Ends::OtherType { "other-1" } else { "told-1" };
        let expected = Expected::Type(MachineType::new(machine).expect("a name"));
        let stop = Stop::new();
        let mut options = ArrivalOptions::new(expected).send_reason(sends);
        if ends == Ends::OtherChannels {
            options = options.receive(ReceiveOptions::new().channels(ChannelCount::Exact(channels + 1)));
        }
        let arrival = Arrival::listen(listener, options, &stop)?.accept()?;
        arrive(arrival, ends, &stop)
    });
    let (source, mut guest) = (blocks(&RAM), Told::default());
    let leaving = departure(&source, channels, MigrateOptions::new(), &Stop::new());
    let error = leaving.migrate(address, &mut NeverDirty, &mut guest).expect_err("not taken");
    assert_eq!(guest.stops, guest.resumes, "{ends:?}");
    assert_eq!(arriving.join().expect("no panic").is_ok(), ends == Ends::Dropped);
    error
}

/// Regression: the error listed channels, compression, UUID and machine type, although the embedder had refused.
#[test]
fn a_source_is_told_why_its_destination_refuses() {
    let own = "expected a counter of version 2\" (SHUT 1)";
    for (ends, why) in [
        (Ends::OtherType, "the source has machine type told-1, this side has other-1"),
        (Ends::OtherChannels, "channels"),
        (Ends::MakeFails, own),
        (Ends::MakePanics, "a thread of the destination's program panicked"),
        (Ends::AnnouncedRefused, own),
        (Ends::OtherBlocks, "does not exist on this side"),
        (Ends::Refused, own),
        (Ends::Dropped, "the destination's program ended the migration without a reason"),
        (Ends::Panicked, "a thread of the destination's program panicked"),
        (Ends::Cancelled, "the migration was cancelled"),
    ] {
        for channels in [0, 2] {
            let error = told(ends, channels, true);
            assert_eq!(error.fault(), Fault::Peer, "{ends:?}, {channels} channels: {error:?}");
            let text = chain(&error).to_string();
            let (_, reason) = text.split_once("the destination refused: \"").expect(&text);
            assert!(reason.contains(why), "{ends:?}, {channels} channels: {text}");
            assert!(!text.contains("likely"), "no list where the cause is known: {text}");
        }
    }
}

/// The closure of `Arrival::load` cannot be interrupted. When it returns too late, both sides learn that it was the cause.
#[test]
fn a_closure_that_hangs_is_named_on_both_sides() {
    for channels in [0, 2] {
        let (listener, address) = listening();
        let arriving = thread::spawn(move || {
            let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
            let options = ArrivalOptions::new(expected).stall_timeout(Some(Duration::from_millis(300)));
            let stop = Stop::new();
            let arrival = Arrival::listen(listener, options, &stop)?.accept()?;
            arrival.load(|configuration, list| {
                stop.pause(Duration::from_secs(60)).expect_err("the limit has passed");
                as_announced(configuration, list)
            })
        });
        let (source, mut guest) = (blocks(&RAM), Told::default());
        let leaving = departure(&source, channels, MigrateOptions::new(), &Stop::new());
        let left = leaving.migrate(address, &mut NeverDirty, &mut guest).expect_err("not taken");
        let error = arriving.join().expect("no panic").expect_err("too late");
        assert!(matches!(error, Error::CallbackHangs { call: Callback::MakeBlocks, .. }), "{error:?}");
        assert!(
            chain(&left).to_string().contains("the closure of Arrival::load has not returned for "),
            "{left:?}"
        );
        assert_eq!(guest.stops, guest.resumes);
    }
}

#[test]
fn a_destination_that_keeps_its_reason_to_itself_says_only_that_it_failed() {
    for ends in [Ends::OtherType, Ends::MakeFails, Ends::Refused] {
        let text = chain(&told(ends, 2, false)).to_string();
        assert!(text.contains("the destination reported failure (SHUT 1)"), "{text}");
        assert!(!text.contains("counter") && !text.contains("other-1"), "{text}");
    }
}
