//! A program that decompresses a file: `zstd -dc` and the like, as libvirt runs them.
//!
//! The child reads the file itself and writes to a pipe. It ends with this value at the latest.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    process::{Child, ChildStdout, Command, Stdio},
};

use multifd::error::UntrustedText;
use qemu_stream::format::Compressor;

/// A decompressor that runs.
#[derive(Debug)]
pub(super) struct Decompressor {
    by: Compressor,
    child: Child,
    output: Option<ChildStdout>,
    /// What it reports. A file, because nobody reads a pipe meanwhile.
    messages: File,
}

impl Decompressor {
    /// Starts the program with `file` as its input, from its present position on. What it reports goes to `messages`, a scratch
    /// file.
    ///
    /// # Errors
    /// If it is not installed or cannot be started.
    pub(super) fn start(by: Compressor, file: File, messages: File) -> io::Result<Self> {
        let started = Command::new(by.name())
            .arg("-dc")
            .stdin(file)
            .stdout(Stdio::piped())
            .stderr(messages.try_clone()?)
            .spawn();
        let mut child = started.map_err(|error| {
            let why = format!(
                "it is compressed with {0}, and {0} cannot be started: {error}; install it",
                by.name()
            );
            io::Error::new(error.kind(), why)
        })?;
        let output = child.stdout.take();
        Ok(Self { by, child, output, messages })
    }

    /// What it writes.
    pub(super) fn output(&mut self) -> impl Read + '_ {
        Output(self.output.as_mut())
    }

    /// Reads the rest of its output, so that it compares all of the file with its checksums.
    ///
    /// # Errors
    /// If it has failed.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        io::copy(&mut self.output(), &mut io::sink())?;
        self.failure().map_or(Ok(()), Err)
    }

    /// Why it has failed; `None` if it has not.
    pub(super) fn failure(&mut self) -> Option<io::Error> {
        // Otherwise it could wait for a reader.
        drop(self.output.take());
        let status = self.child.wait().ok()?;
        // A signal may be from the closed pipe.
        let is_warning = |code: i32| self.by == Compressor::Gzip && code == GZIP_WARNING;
        status.code().filter(|code| *code != 0 && !is_warning(*code))?;
        let mut text = Vec::new();
        self.messages.seek(SeekFrom::Start(0)).ok()?;
        Read::by_ref(&mut self.messages).take(MESSAGE).read_to_end(&mut text).ok()?;
        let text = UntrustedText::from_bytes(text.trim_ascii());
        Some(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} cannot decompress it: {text}", self.by.name()),
        ))
    }
}

impl Drop for Decompressor {
    fn drop(&mut self) {
        drop(self.output.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The pipe; it is at its end when it is gone.
struct Output<'a>(Option<&'a mut ChildStdout>);

impl Read for Output<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.as_mut().map_or(Ok(0), |output| output.read(into))
    }
}

/// The exit code of gzip if only bytes after the end are no compressed data.
const GZIP_WARNING: i32 = 2;
/// Bytes of its messages that are shown.
const MESSAGE: u64 = 512;
