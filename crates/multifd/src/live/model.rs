//! Models of the wait before the switchover and of the end of a migration.
//!
//! The package `multifd-models` runs each under many schedules; see `docs/develop/concurrency.md`.

use std::sync::Arc;

use super::{LastWord, Owner, Progress, control::Gate};
use crate::{
    channel::{
        Context, Link, Stop,
        memory::{self, MemoryLink},
    },
    error::{Error, Usage},
    outcome::Status,
    ram::{PageSize, Part, PartMut},
    sync_types::{Mutex, model::thread},
};

fn active() -> Progress {
    let progress = Progress::new(0, PageSize::KIB_4, 0, Stop::new().callbacks().clone());
    progress.advance(Status::Setup).expect("the first");
    progress.advance(Status::Active).expect("behind set-up");
    progress
}

/// One thread waits for the pause and continues the migration, another cancels at any time.
pub fn a_pause_before_the_switchover_ends_when_told_or_with_the_stop() {
    let (stop, progress, gate) = (Stop::new(), active(), Gate::default());
    let control = gate.control(progress.clone());
    let telling =
        thread::spawn(move || if control.wait_pre_switchover() { control.proceed().is_ok() } else { false });
    let cancelling = {
        let stop = stop.clone();
        thread::spawn(move || stop.cancel())
    };
    let paused = gate.pause(&progress, &stop);
    assert!(paused.is_ok() || paused.is_err_and(|error| error.is_cancelled()));
    telling.join().expect("no panic");
    cancelling.join().expect("no panic");
}

/// The migration ends without a pause while a thread waits for one.
pub fn whoever_waits_for_a_pause_is_told_that_there_is_none() {
    let (progress, gate) = (active(), Gate::default());
    let control = gate.control(progress);
    let waiting = thread::spawn(move || control.wait_pre_switchover());
    drop(gate);
    assert!(!waiting.join().expect("no panic"));
}

/// Nobody cancels: the migration continues after `proceed`.
pub fn a_pause_that_is_told_to_go_on_goes_on() {
    let (stop, progress, gate) = (Stop::new(), active(), Gate::default());
    let control = gate.control(progress.clone());
    let telling = thread::spawn(move || control.wait_pre_switchover() && control.proceed().is_ok());
    gate.pause(&progress, &stop).expect("told to go on");
    assert!(telling.join().expect("no panic"));
}

/// A thread calls `proceed` without having waited: the call is accepted, or refused with a state other than the pause.
pub fn whoever_sees_the_pause_can_end_it() {
    let (stop, progress, gate) = (Stop::new(), active(), Gate::default());
    let control = gate.control(progress.clone());
    let telling = {
        let stop = stop.clone();
        thread::spawn(move || {
            if let Err(refused) = control.proceed() {
                let found = Error::from(Usage::NotPaused { found: Status::Active });
                assert_eq!(refused.to_string(), found.to_string());
                stop.cancel();
            }
        })
    };
    let paused = gate.pause(&progress, &stop);
    assert!(paused.is_ok() || paused.is_err_and(|error| error.is_cancelled()));
    telling.join().expect("no panic");
}

/// The last message of the source, and the replies of the destination: SHUT 0, SHUT 1.
const EVERYTHING: u8 = b'E';
const TAKEN: u8 = b'0';
const FAILED: u8 = b'1';

fn say(link: &mut MemoryLink, byte: u8) -> bool {
    link.send(&[Part::from(&[byte][..])]).is_ok()
}

/// `None` if the other end, or the network between, has closed.
fn hear(link: &mut MemoryLink) -> Option<u8> {
    let mut byte = [0];
    match link.recv(&mut [PartMut::from(&mut byte[..])]) {
        Ok(1) => Some(byte[0]),
        _ => None,
    }
}

/// Forwards bytes in one direction until the end, or until the network is cut. Bytes in transit are then lost, and both
/// ends find their connections closed.
fn pass_on(mut from: MemoryLink, into: Arc<Mutex<MemoryLink>>, cut: &Stop) {
    while let Some(byte) = hear(&mut from) {
        if cut.is_stopped() || !say(&mut into.lock().expect("whole"), byte) {
            break;
        }
    }
    if cut.is_stopped() {
        from.waker().wake();
        into.lock().expect("whole").waker().wake();
    } else {
        // An end of the stream is forwarded as an end.
        let _ = into.lock().expect("whole").close_send();
    }
}

/// The source's end: sends everything, is cancelled at any time or never, and judges the reply as a real source does.
fn source_ends(mut main: MemoryLink, mut back: MemoryLink, stop: &Stop, always_speaks: bool) -> Owner {
    let half = stop.watch_failure(main.send_waker());
    if stop.check().is_err() || !say(&mut main, EVERYTHING) {
        return Owner::Source;
    }
    let word = match hear(&mut back) {
        Some(TAKEN) => LastWord::Shut(0),
        Some(_) => LastWord::Shut(1),
        None => LastWord::Closed,
    };
    drop(half);
    word.owner(always_speaks)
}

/// The destination's end: returns whether it has the guest.
fn destination_ends(mut main: MemoryLink, mut back: MemoryLink, fails: bool) -> bool {
    let whole = hear(&mut main) == Some(EVERYTHING);
    // The same check as in `Incoming::finish`: a closed connection means that the source has taken the guest back.
    let there = whole && !main.is_readable().expect("it can tell");
    if !there || fails {
        say(&mut back, FAILED);
        return false;
    }
    say(&mut back, TAKEN)
}

/// Runs both ends over a network that may be cut at any moment.
fn the_end(cancels: bool, cuts: bool, fails: bool, always_speaks: bool) -> (Owner, bool) {
    let context = Context::new(&Stop::new());
    let pair = || memory::pair(1, &context, &context);
    let (source_main, to_network) = pair();
    let (from_network, destination_main) = pair();
    let (source_back, back_to_source) = pair();
    let (back_from_destination, destination_back) = pair();
    let (stop, cut) = (Stop::new(), Stop::new());
    let ways = [(to_network, from_network), (back_from_destination, back_to_source)].map(|(from, into)| {
        let (into, cut) = (Arc::new(Mutex::new(into)), cut.clone());
        let way = thread::spawn({
            let into = into.clone();
            move || pass_on(from, into, &cut)
        });
        (way, into)
    });
    let cancelling = cancels.then(|| {
        let stop = stop.clone();
        thread::spawn(move || stop.cancel())
    });
    let cutting = cuts.then(|| {
        let (cut, ends) = (cut.clone(), ways.each_ref().map(|(_, into)| into.clone()));
        let wakers =
            [source_main.waker(), source_back.waker(), destination_main.waker(), destination_back.waker()];
        thread::spawn(move || {
            cut.cancel();
            wakers.into_iter().for_each(|waker| waker.wake());
            drop(ends);
        })
    });
    let destination = thread::spawn(move || destination_ends(destination_main, destination_back, fails));
    let owner = source_ends(source_main, source_back, &stop, always_speaks);
    let taken = destination.join().expect("no panic");
    for (way, _) in ways {
        way.join().expect("no panic");
    }
    for thread in cancelling.into_iter().chain(cutting) {
        thread.join().expect("no panic");
    }
    (owner, taken)
}

/// Regardless of cancels and cuts: the guest has one owner, or the source knows that the owner is unknown.
pub fn whatever_is_cut_at_the_end_there_are_never_two_owners() {
    for (cancels, cuts, fails) in [(true, true, false), (true, true, true)] {
        let (owner, taken) = the_end(cancels, cuts, fails, true);
        assert!(!(owner == Owner::Source && taken), "two owners");
        assert!(owner != Owner::Destination || taken, "no owner, and nobody knows");
    }
}

/// A cancel that races with the destination's reply, over a network that is not cut: both sides always know the owner.
pub fn without_a_cut_both_sides_know_who_has_the_guest() {
    for (cancels, fails) in [(true, false), (false, false), (false, true)] {
        let (owner, taken) = the_end(cancels, false, fails, true);
        assert_eq!(owner, if taken { Owner::Destination } else { Owner::Source });
        assert!(cancels || taken != fails, "nobody has cancelled");
    }
}
