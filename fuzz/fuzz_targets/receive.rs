//! The whole receiving side: main and channels over links in memory, in the order and the pieces that the input says.
//!
//! The input is a row of pieces: a byte whose low two bits name the connection (3 is main), two bytes of length, so many
//! bytes. A connection is opened by its first piece; all are closed behind the last.
#![no_main]

mod machine;

use std::time::Duration;

use multifd::{
    ReceiveOptions, Receiver,
    channel::{Connect, Context, Link, Stop, memory},
};
use multifd_fuzz::shown;
use qemu_stream::incoming::{Expected, Incoming, Loader};

const MAIN: u8 = 3;
const LIMIT: Duration = Duration::from_millis(20);

multifd_fuzz::target!(|bytes: &[u8]| {
    let (connector, listener) = memory::network(1 << 20);
    let stop = Stop::new();
    let options = ReceiveOptions::new()
        .greeting_timeout(LIMIT)
        .channels_timeout(LIMIT)
        .drain_timeout(LIMIT)
        .stall_timeout(Some(2 * LIMIT));
    let mut receiver = Receiver::new(options, stop.clone());
    receiver.listen(Box::new(listener)).expect("the first time");
    // Without main, a destination waits for it as long as it takes.
    if !play(bytes, &connector).starts_with(b"QEVM") {
        return;
    }
    let Ok(main) = receiver.wait_main() else { return };
    let mut incoming = Incoming::new(main).silence(LIMIT).stall_timeout(Some(LIMIT));
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| machine::blocks(list));
    shown(incoming.run(&mut loader));
    stop.cancel();
});

/// Sends every piece; the pipes hold all of an input. Gives what main was sent.
fn play(mut bytes: &[u8], connector: &dyn Connect) -> Vec<u8> {
    let mut links: [Option<Box<dyn Link>>; 4] = [const { None }; 4];
    let mut main = Vec::new();
    while let Some((&[tag, high, low], rest)) = bytes.split_first_chunk() {
        let (piece, rest) = rest.split_at(rest.len().min(usize::from(high) << 8 | usize::from(low)));
        bytes = rest;
        if tag & 3 == MAIN {
            main.extend(piece);
        }
        let slot = &mut links[usize::from(tag & 3)];
        if slot.is_none() {
            // What came before may have ended the migration, and its listener.
            let context = Context::new(&Stop::new()).connect_timeout(LIMIT);
            let Ok(link) = connector.connect(&context) else { break };
            *slot = Some(link);
        }
        let Some(link) = slot else { break };
        let mut piece = piece;
        while !piece.is_empty() {
            let Ok(sent) = link.send(&[piece.into()]) else { break };
            piece = &piece[sent..];
        }
    }
    main
}
