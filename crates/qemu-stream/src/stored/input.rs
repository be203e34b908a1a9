//! A stream that is read from its beginning to its end, and where its pages stay.

use std::{
    fs::File,
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use multifd::channel::Stop;

use super::ahead::InFile;

/// What is read. It is not generic: what reads a stream would be in a program once for each kind otherwise.
pub(super) enum Input<'a> {
    /// One byte after the other.
    InOrder(&'a mut dyn Read),
    /// A stream in a file, in which its pages stay.
    InFile(InFile),
}

/// The file in which a stream is, and where the stream begins in it.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) file: Arc<File>,
    pub(super) begin: u64,
}

/// A stream whose bytes are counted, and that ends with an error when the command is cancelled.
pub(super) struct Counted<'a> {
    pub(super) input: Input<'a>,
    pub(super) read: &'a AtomicU64,
    pub(super) stop: &'a Stop,
}

impl Counted<'_> {
    /// Jumps over bytes, and returns how many there were. What is not in a file has none that could be jumped over.
    pub(super) fn skip(&mut self, count: u64) -> io::Result<u64> {
        self.check()?;
        let skipped = match &mut self.input {
            Input::InOrder(_) => 0,
            Input::InFile(ahead) => ahead.skip(count)?,
        };
        // Relaxed: it is only displayed.
        self.read.fetch_add(skipped, Ordering::Relaxed);
        Ok(skipped)
    }

    fn check(&self) -> io::Result<()> {
        if self.stop.is_stopped() { Err(io::Error::other("it was cancelled")) } else { Ok(()) }
    }
}

impl Read for Counted<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        let count = match &mut self.input {
            Input::InOrder(stream) => stream.read(into),
            Input::InFile(ahead) => ahead.read(into),
        }?;
        // Relaxed: it is only displayed.
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
