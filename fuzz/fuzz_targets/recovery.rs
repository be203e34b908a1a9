//! A source that has switched to post-copy, and returns: what it sends from its switch on, over one main connection after the other.
//!
//! The input is a byte of options (1: the guest runs before its RAM is there, where this system allows it) and a row of pieces: two
//! bytes of length, that number of bytes. The first piece follows the switch, each other one is all of another connection.
#![no_main]

mod machine;
mod switch;

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    sync::OnceLock,
    thread,
    time::Duration,
};

use multifd::{
    Error, ReceiveOptions,
    channel::{Listener, Stop},
};
use multifd_fuzz::shown;
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Landing},
    incoming::Expected,
};

const LIMIT: Duration = Duration::from_millis(30);
/// More of them take longer than a fuzzer has patience.
const CONNECTIONS: usize = 4;

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some((options, pieces)) = bytes.split_first() else { return };
    let early = options & 1 != 0;
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let path = FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder")).path().join("socket");
    let address = format!("unix:{}", path.display()).parse().expect("an address");
    let listener = Listener::bind(&address).expect("bound");
    let stop = Stop::new();
    let receives = thread::spawn({
        let stop = stop.clone();
        move || receive(listener, early, &stop)
    });
    play(&path, pieces);
    shown(receives.join().expect("no panic"));
    stop.cancel();
});

fn receive(listener: Listener, early: bool, stop: &Stop) -> Result<(), Error> {
    let receive = ReceiveOptions::new()
        .greeting_timeout(LIMIT)
        .channels_timeout(LIMIT)
        .drain_timeout(LIMIT)
        .accept_timeout(Some(10 * LIMIT));
    let options = ArrivalOptions::new(Expected::AnyMachine).receive(receive).postcopy(true);
    let options = options.stall_timeout(Some(2 * LIMIT)).pause_timeout(Some(LIMIT)).silence(LIMIT);
    let arrival = Arrival::listen(listener, options.run_early(early), stop)?.accept()?;
    if !early {
        return arrival.load(|_, list| machine::blocks(list))?.confirm().map(drop);
    }
    let announced = arrival.announced()?;
    let blocks = machine::blocks(announced.list())?;
    match announced.load_early(blocks, EarlyOptions::new())? {
        Landing::Complete(pending) => pending.confirm().map(drop),
        Landing::Early(landed) => {
            let mut running = landed.confirm()?;
            if running.wait(Some(4 * LIMIT)) {
                running.finish()?;
            }
            Ok(())
        }
    }
}

/// Plays the source.
fn play(path: &Path, mut pieces: &[u8]) {
    let mut begins =
        Some([switch::before(), switch::package(&switch::device(2, "timer", b"state"))].concat());
    for _ in 0..CONNECTIONS {
        let (piece, rest) = match pieces.split_first_chunk() {
            Some((&length, rest)) => rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(length)))),
            None if begins.is_some() => (&[][..], &[][..]),
            None => return,
        };
        pieces = rest;
        let Ok(mut socket) = UnixStream::connect(path) else { return };
        // It may have ended before.
        let _ = socket.write_all(&[begins.take().as_deref().unwrap_or_default(), piece].concat());
        let _ = socket.shutdown(Shutdown::Write);
        socket.set_read_timeout(Some(LIMIT)).expect("set");
        let mut replies = Vec::new();
        let _ = socket.read_to_end(&mut replies);
    }
}
