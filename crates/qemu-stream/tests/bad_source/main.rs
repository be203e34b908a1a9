//! Sources that misbehave, over real sockets, and how a destination ends: with the first cause, in time, with nothing
//! written outside the allowed pages, with no thread and no descriptor left.
//!
//! It is one test in a separate process, because it counts the threads and descriptors of the process.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, Error, ReceiveOptions, Receiver,
    channel::{Address, Listener, Stop},
    error::chain,
    ram::{Mapping, Memory, RamBlock, RamBlocks},
};
use multifd_testkit::{
    bad_source::{BLOCKS, On, PAGE, Script, Target, page_of},
    in_use, in_use_after,
};
use qemu_stream::{
    format::BlockList,
    incoming::{Expected, Incoming, Loader, Outcome},
};

mod lost;
mod rows;

use On::Main;

/// The value of time limits, so that waits are short.
const LIMIT: Duration = Duration::from_millis(400);
/// The stall timeout: longer than all other waits of this side.
const STALL: Duration = Duration::from_millis(1800);
/// The time limit of the first bytes: a script may do much between a connect and these.
const GREETING: Duration = Duration::from_millis(1000);
/// From the fault to the end, on a machine with other load.
const SOON: Duration = Duration::from_secs(10);

/// A script, the number of channels that its destination expects, and how it ends: successfully, or with an error of
/// this kind whose chain contains all of these texts.
struct Row {
    name: &'static str,
    script: Script,
    channels: ChannelCount,
    ends: Option<(&'static str, &'static [&'static str])>,
}

/// Whether the guest's memory may have this byte there, at the end or at any time before, according to the script.
fn may_hold(block: usize, at: usize, byte: u8) -> bool {
    let page = (at / PAGE) as u64;
    byte == 0 || block == 0 && [1, 2].iter().any(|version| page_of(page, *version)[at % PAGE] == byte)
}

const GUARD: u8 = 0xa5;
const BEHIND: usize = 16 * PAGE;

/// Blocks in memory that extends beyond them.
fn guarded(list: &BlockList) -> multifd::Result<RamBlocks> {
    let block = |entry: &qemu_stream::format::BlockEntry| -> multifd::Result<RamBlock> {
        let mapping = Mapping::anonymous(entry.used_length + BEHIND as u64)
            .map_err(|error| Error::io("map memory", error))?;
        let length = usize::try_from(entry.used_length).expect("small");
        mapping.slice(length as u64, BEHIND).expect("there").copy_from(&[GUARD; BEHIND]);
        let memory = Memory::Mapped(mapping);
        Ok(RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), memory)?)
    };
    Ok(RamBlocks::new(list.entries().iter().map(block).collect::<multifd::Result<_>>()?)?)
}

fn assert_nothing_else_written(row: &str, blocks: &RamBlocks) {
    for (index, block) in blocks.iter() {
        let Memory::Mapped(mapping) = block.memory() else { unreachable!("mapped above") };
        let mut bytes = vec![0; usize::try_from(mapping.len()).expect("small")];
        mapping.slice(0, bytes.len()).expect("whole").copy_to(&mut bytes);
        let (inside, behind) = bytes.split_at(usize::try_from(block.used_length()).expect("small"));
        let wrong = inside.iter().enumerate().find(|(at, byte)| !may_hold(index.0, *at, **byte));
        assert!(wrong.is_none(), "{row}: block {} at {wrong:?}", index.0);
        assert!(behind.iter().all(|byte| *byte == GUARD), "{row}: behind block {}", index.0);
    }
}

fn assert_whole(row: &str, blocks: &RamBlocks) {
    let (_, ram) = blocks.iter().next().expect("a block");
    let mut bytes = vec![0; PAGE];
    for page in 0..BLOCKS[0].1 / PAGE as u64 {
        ram.load(multifd::ram::PageIndex(page), &mut bytes).expect("mapped");
        let version = if page == 3 { 2 } else { 1 };
        assert!(bytes == page_of(page, version), "{row}: page {page}");
    }
}

/// The result of a destination.
struct Ended {
    result: Result<(), Error>,
    blocks: Option<Arc<RamBlocks>>,
    took: Duration,
}

/// Receives a migration, as a program would.
fn take_in(mut receiver: Receiver, stop: &Stop) -> (Result<(), Error>, Option<Arc<RamBlocks>>) {
    let main = match receiver.wait_main() {
        Ok(main) => main,
        Err(error) => return (Err(error), None),
    };
    let incoming = Incoming::new(main).silence(LIMIT).stall_timeout(Some(STALL));
    let mut incoming = incoming.channels_may_break(true);
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| guarded(list));
    let loaded = incoming.run(&mut loader);
    let blocks = receiver.arrived().map(|arrived| arrived.blocks().clone());
    let loaded = loaded.map_err(|error| Error::other("the migration broke off", error));
    let loaded = loaded.and_then(|loaded| loader.finish(&loaded).map(drop)).map_err(|error| stop.fail(error));
    let outcome = if loaded.is_ok() { Outcome::Loaded } else { Outcome::Failed };
    let told = incoming.finish(outcome);
    let result = match loaded {
        Err(error) => {
            receiver.clean_up();
            Err(error)
        }
        Ok(()) => told
            .map_err(|error| stop.fail(Error::other("the confirmation could not be sent", error)))
            .and_then(|_main| receiver.finish().map(drop)),
    };
    (result, blocks)
}

fn run(row: &Row) -> Ended {
    let stop = Stop::new();
    let options = ReceiveOptions::new()
        .channels(row.channels)
        .greeting_timeout(GREETING)
        .channels_timeout(GREETING)
        .drain_timeout(LIMIT)
        .stall_timeout(Some(STALL));
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("listening");
    let Address::Tcp { port, .. } = listener.local_address().clone() else { unreachable!("bound above") };
    let target = Target::Tcp(([127, 0, 0, 1], port).into());
    let mut receiver = Receiver::new(options, stop.clone());
    receiver.listen(Box::new(listener)).expect("listening");
    let destination = thread::spawn({
        let stop = stop.clone();
        move || {
            let ended = take_in(receiver, &stop);
            (ended, Instant::now())
        }
    });
    let mut heard = row.script.play(&target).expect("a destination that does not hang");
    let played = Instant::now();
    // A source that never sends anything is not missed: the wait for main has no limit.
    if !row.script.steps.iter().any(|step| step.on == Main) {
        thread::sleep(2 * LIMIT);
        assert!(!destination.is_finished(), "{}: main may come late", row.name);
        stop.cancel();
    }
    let said = heard.rest().expect("a destination that hangs up").to_vec();
    let ((result, blocks), ended) = destination.join().expect("no panic");
    drop(heard);
    let opened = row.script.steps.iter().any(|step| step.on == Main && step.name == "commands");
    if result.is_ok() && opened {
        assert!(said.ends_with(&[0, 1, 0, 4, 0, 0, 0, 0]), "{}: SHUT 0, {said:?}", row.name);
    } else {
        assert!(!said.ends_with(&[0, 1, 0, 4, 0, 0, 0, 0]), "{}: no SHUT 0, {said:?}", row.name);
    }
    Ended { result, blocks, took: ended.saturating_duration_since(played) }
}

/// The kind of the first error, and its text with causes.
fn kind_and_text(error: &Error) -> (String, String) {
    let kind = match error.kind() {
        Error::Other { source, .. } => {
            format!("{:?}", source.downcast_ref::<qemu_stream::Error>().expect("main's error"))
        }
        kind => format!("{kind:?}"),
    };
    (kind, chain(error).to_string())
}

#[test]
fn every_bad_source_ends_in_its_error_and_leaves_nothing() {
    let before = in_use();
    let (mut faults, mut longest) = (0, (Duration::ZERO, ""));
    for row in rows::rows() {
        let Ended { result, blocks, took } = run(&row);
        match (&result, &row.ends) {
            (Ok(()), None) => assert_whole(row.name, blocks.as_ref().expect("loaded")),
            (Err(error), Some((kind, texts))) => {
                faults += 1;
                let (found, text) = kind_and_text(error);
                println!("{}: {text}", row.name);
                assert!(found.starts_with(kind), "{}: expected {kind}, found {found}: {text}", row.name);
                for words in *texts {
                    assert!(text.contains(words), "{}: expected {words:?} in {text:?}", row.name);
                }
            }
            (Ok(()), Some(_)) => panic!("{}: ended well", row.name),
            (Err(error), None) => panic!("{}: {}", row.name, chain(error)),
        }
        assert!(took < SOON, "{}: took {took:?}", row.name);
        longest = longest.max((took, row.name));
        if let Some(blocks) = &blocks {
            assert_nothing_else_written(row.name, blocks);
        }
        let left = in_use_after(before);
        assert_eq!(left, before, "{}: threads and descriptors", row.name);
    }
    println!("{faults} faults, longest from the last step to the end: {longest:?}");
}
