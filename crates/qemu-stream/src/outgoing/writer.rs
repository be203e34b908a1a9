//! Buffers the main stream before the connection.

use std::io::Write;

use crate::{
    connection::Connection,
    error::{Error, Place, StreamKind},
};

/// Collects small fields and writes them in one call.
#[derive(Debug)]
pub(super) struct Writer<C> {
    connection: C,
    buffer: Vec<u8>,
    written: u64,
}

impl<C: Connection> Writer<C> {
    /// Ends the connection to a destination that sends no result.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        let finished = self.connection.finish();
        finished.map_err(|source| Error::Io { at: self.here(), doing: "end the connection", source })
    }
}

impl<C: Write> Writer<C> {
    pub(super) fn new(connection: C) -> Self {
        Self { connection, buffer: Vec::with_capacity(FULL + FULL / 2), written: 0 }
    }

    /// The buffer, to which fields are appended.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    pub(super) fn connection(&mut self) -> &mut C {
        &mut self.connection
    }

    pub(super) fn connection_ref(&self) -> &C {
        &self.connection
    }

    pub(super) fn into_inner(self) -> C {
        self.connection
    }

    pub(super) fn bytes(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Writes the buffer if it is full.
    pub(super) fn spill(&mut self) -> Result<(), Error> {
        if self.buffer.len() < FULL { Ok(()) } else { self.write() }
    }

    /// Writes the buffer, and flushes the connection.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.write()?;
        let flushed = self.connection.flush();
        flushed.map_err(|source| Error::Io { at: self.here(), doing: "write", source })
    }

    /// Writes long contiguous bytes without copying them into the buffer, which must be empty.
    pub(super) fn write_through(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = self.connection.write_all(bytes).and_then(|()| self.connection.flush());
        written.map_err(|source| Error::Io { at: self.here(), doing: "write", source })?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn write(&mut self) -> Result<(), Error> {
        let written = self.connection.write_all(&self.buffer);
        written.map_err(|source| Error::Io { at: self.here(), doing: "write", source })?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn here(&self) -> Place {
        Place { stream: StreamKind::Main, offset: self.written }
    }
}

/// The minimum length of a write between two sync points, in bytes.
const FULL: usize = 256 << 10;

/// An error of main as an error of the engine.
pub(super) fn failed(error: impl Into<Error>) -> multifd::Error {
    error.into().while_doing("the main stream failed")
}
