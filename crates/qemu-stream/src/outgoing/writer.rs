//! The buffer before the connection.

use std::io::Write;

use crate::{
    connection::Connection,
    error::{Error, Place, StreamKind},
};

/// Gathers small fields and writes them in one call.
#[derive(Debug)]
pub(super) struct Writer<C> {
    connection: C,
    buffer: Vec<u8>,
    written: u64,
}

impl<C: Connection> Writer<C> {
    /// Takes leave of a destination that says nothing.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        let finished = self.connection.finish();
        finished.map_err(|source| Error::Io { at: self.here(), doing: "end the connection in order", source })
    }
}

impl<C: Write> Writer<C> {
    pub(super) fn new(connection: C) -> Self {
        Self { connection, buffer: Vec::with_capacity(FULL + FULL / 2), written: 0 }
    }

    /// Where fields are appended.
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

    /// Writes the buffer and whatever the connection keeps.
    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.write()?;
        let flushed = self.connection.flush();
        flushed.map_err(|source| Error::Io { at: self.here(), doing: "write", source })
    }

    /// Writes bytes that are long and in one place already, past the buffer, which must be empty.
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

/// Bytes that are written at once, at least, between two sync points.
const FULL: usize = 256 << 10;

/// An error of main as the engine tells it.
pub(super) fn failed(error: impl Into<Error>) -> multifd::Error {
    error.into().while_doing("the main stream failed")
}
