//! The whole main stream of a source with multifd off, into blocks of memory that are no larger than a bound.
#![no_main]

mod machine;

use std::{
    io::{Cursor, Read, Write},
    sync::Arc,
    time::Duration,
};

use multifd::{
    ReceiveOptions, Receiver,
    channel::{Stop, Wake},
};
use qemu_stream::{
    Connection,
    incoming::{Expected, Incoming, Loader},
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

/// Nothing here waits for a peer.
impl Connection for Source<'_> {
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn set_read_timeout(&mut self, _: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
}

multifd_fuzz::target!(|bytes: &[u8]| {
    let receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
    let mut incoming = Incoming::new(Source(Cursor::new(bytes))).suppress_vmdesc(true);
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |_, list| machine::blocks(list));
    let _ = incoming.run(&mut loader);
});
