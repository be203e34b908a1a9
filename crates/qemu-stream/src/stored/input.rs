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

use crate::format::Skip;

/// The file in which a stream is, and where the stream begins in it.
#[derive(Debug)]
pub(super) struct Home<R> {
    pub(super) file: Arc<File>,
    pub(super) begin: u64,
    pub(super) skip: fn(&mut R, u64) -> io::Result<u64>,
}

/// A stream whose bytes are counted, and that ends with an error when the command is cancelled.
pub(super) struct Counted<'a, R> {
    pub(super) stream: R,
    pub(super) read: &'a AtomicU64,
    pub(super) stop: &'a Stop,
    /// Jumps over bytes, if the stream can.
    pub(super) skip: Option<fn(&mut R, u64) -> io::Result<u64>>,
}

impl<R> Counted<'_, R> {
    /// How its reader jumps.
    pub(super) fn jump() -> Skip<Self> {
        |counted, count| {
            counted.check()?;
            let skipped = counted.skip.map_or(Ok(0), |skip| skip(&mut counted.stream, count))?;
            // Relaxed: it is only displayed.
            counted.read.fetch_add(skipped, Ordering::Relaxed);
            Ok(skipped)
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.stop.is_stopped() { Err(io::Error::other("it was cancelled")) } else { Ok(()) }
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        let count = self.stream.read(into)?;
        // Relaxed: it is only displayed.
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
