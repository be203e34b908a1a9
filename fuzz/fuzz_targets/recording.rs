//! Recordings of migrations: a time line of any bytes, every direction as bytes, and every connection as a link. What a file does not have
//! is not allocated.
#![no_main]

use std::{
    io::Read,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use multifd::{
    channel::{Context, Listen, Stop},
    ram::PartMut,
};
use multifd_fuzz::shown;
use qemu_stream::recording::{OneWay, Played, Recording, Side, Timeline};

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some(recording) = shown(Recording::open(bytes)) else { return };
    let Some(found) = shown(Timeline::of(&recording)) else { return };
    let mut sum = 0;
    for connection in &found.connections {
        for side in [Side::Source, Side::Destination] {
            let mut all = Vec::new();
            let mut way = OneWay::new(&recording, connection.number, side);
            way.read_to_end(&mut all).expect("all records were read before");
            sum += all.len();
        }
    }
    assert!(sum <= bytes.len());
    let file = multifd_fuzz::file();
    if file.write_all_at(bytes, 0).is_err() {
        return;
    }
    let read = Arc::new(AtomicU64::new(0));
    let recording = Recording::open(file).expect("it was opened before");
    let Some(mut played) = shown(Played::new(Arc::new(recording), read.clone())) else { return };
    let (context, mut all) = (Context::new(&Stop::new()), 0);
    while let Ok(Some(mut link)) = played.accept_waiting(&context) {
        let mut bytes = [0; 100];
        while let Ok(count @ 1..) = link.recv(&mut [PartMut::from(&mut bytes[..])]) {
            all += count;
        }
    }
    assert!(all as u64 <= read.load(Ordering::Relaxed) && all <= sum);
});
