//! The whole main stream of a source with multifd off, into blocks of memory that are no larger than a bound.
#![no_main]

use std::{
    io::{Cursor, Read, Write},
    time::Duration,
};

use libfuzzer_sys::fuzz_target;
use multifd::{
    Error, ReceiveOptions, Receiver,
    channel::Stop,
    ram::{Mapping, Memory, RamBlock, RamBlocks},
};
use qemu_stream::{
    Connection,
    incoming::{Incoming, Loader},
};

/// Gives the input, takes whatever is answered.
struct Source<'a>(Cursor<&'a [u8]>);

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Source<'_> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        Ok(buffer.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Connection for Source<'_> {
    fn set_read_timeout(&mut self, _: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
}

const MOST_RAM: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    let mut incoming = Incoming::new(Source(Cursor::new(bytes))).suppress_vmdesc(true);
    let mut loader = Loader::new(&receiver, |_, list| {
        if list.total() > MOST_RAM {
            return Err(Error::other("make the blocks", "more RAM than this target gives"));
        }
        let blocks = list.entries().iter().map(|entry| {
            let memory = Mapping::anonymous(entry.used_length).map_err(|error| Error::io("map", error))?;
            RamBlock::fresh(entry.name.clone(), entry.used_length, list.page_size(), Memory::Mapped(memory))
        });
        RamBlocks::new(blocks.collect::<Result<_, Error>>()?)
    });
    let _ = incoming.run(&mut loader);
});
