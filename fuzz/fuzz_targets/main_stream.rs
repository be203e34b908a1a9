//! The whole main stream of a source with multifd off, into blocks of memory that are no larger than a bound; and event by event,
//! each of which is written again. What was written of a whole stream must be read and written as the same bytes.
#![no_main]

mod machine;

use std::time::Duration;

use multifd::{ReceiveOptions, Receiver, channel::Stop};
use multifd_fuzz::{Source, shown};
use qemu_stream::{
    incoming::{Event, Events, Expected, Incoming, Loader},
    outgoing::EventWriter,
};

/// Reads events up to the end or an error and writes them; what was written, and whether it came to its end.
fn written(bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut events = Events::new(bytes).suppress_vmdesc(true);
    let (mut copy, mut ended) = (EventWriter::new(Vec::new()), false);
    while let Some(event) = shown(events.next()) {
        copy.write(&event).expect("what was read is in order");
        ended = matches!(event, Event::End(_));
    }
    copy.flush().expect("into memory");
    (copy.into_inner(), ended)
}

multifd_fuzz::target!(|bytes: &[u8]| {
    let (once, ended) = written(bytes);
    let (twice, ended_again) = written(&once);
    // What ends in an error may not show where its last device ends.
    assert!(once.starts_with(&twice));
    assert!(!ended || (ended_again && once == twice));

    // No channel will connect: a stream that asks for one is not waited for.
    let options = ReceiveOptions::new().channels_timeout(Duration::from_millis(1));
    let receiver = Receiver::new(options, Stop::new());
    let mut incoming = Incoming::new(Source::new(bytes)).suppress_vmdesc(true).postcopy(true);
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| machine::blocks(list));
    shown(incoming.run(&mut loader));
});
