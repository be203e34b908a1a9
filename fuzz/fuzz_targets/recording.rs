//! Recordings of migrations: a time line of any bytes, and every direction as bytes. What a file does not have is not allocated.
#![no_main]

use std::io::Read;

use multifd_fuzz::shown;
use qemu_stream::recording::{OneWay, Recording, Side, Timeline};

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
});
