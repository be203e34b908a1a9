//! Reads a stream in a file ahead, by several threads.
//!
//! ```text
//! stream read 0: pieces 0, 2, 4 … ─┐
//! stream read 1: pieces 1, 3, 5 … ─┴─ in order ─▶ InFile ─▶ heads are copied, contents of pages are jumped over
//!             ▲─── empty buffers ──────────────────┘
//! ```
//!
//! Each thread has two buffers. It waits for an empty one, and ends at the end of the file, after an error, or when [`InFile`] is
//! dropped, which joins it.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use crate::recording::Bytes;

/// A stream in a file from which its pages can be read later.
pub(super) struct InFile {
    threads: Vec<Ahead>,
    /// The number of the piece that is read from now.
    number: usize,
    piece: Vec<u8>,
    at: usize,
}

/// A thread that reads every second piece, or every one if it is alone.
struct Ahead {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    thread: thread::JoinHandle<()>,
}

impl fmt::Debug for InFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What is in the pieces belongs to the guest.
        f.debug_struct("InFile").field("piece", &self.number).finish_non_exhaustive()
    }
}

impl InFile {
    /// From `begin` to the end of the file.
    pub(super) fn new(file: &Arc<File>, begin: u64) -> io::Result<Self> {
        let length = file.metadata()?.len().saturating_sub(begin);
        let count = usize::try_from(length / PIECE as u64).unwrap_or(THREADS).clamp(1, THREADS);
        let mut threads = Vec::with_capacity(count);
        for number in 0..count {
            threads.push(Ahead::start(file.clone(), begin, number, count)?);
        }
        Ok(Self { threads, number: 0, piece: vec![0; PIECE], at: PIECE })
    }

    /// Jumps over bytes, and returns how many there were.
    pub(super) fn skip(&mut self, count: u64) -> io::Result<u64> {
        let mut left = count;
        while left > 0 && self.fill()? {
            let jumped = usize::try_from(left).unwrap_or(usize::MAX).min(self.piece.len() - self.at);
            self.at += jumped;
            left -= jumped as u64;
        }
        Ok(count - left)
    }

    /// Takes the next piece if the last one is used up. Returns whether there are bytes.
    fn fill(&mut self) -> io::Result<bool> {
        if self.at < self.piece.len() {
            return Ok(true);
        }
        if self.piece.len() < PIECE {
            return Ok(false);
        }
        let old = std::mem::take(&mut self.piece);
        // The first one belongs to no thread.
        if let Some(last) =
            self.number.checked_sub(1).and_then(|last| self.threads.get(last % self.threads.len()))
        {
            // It has ended if it has read its last piece.
            let _ = last.empty.send(old);
        }
        let ended = || io::Error::other("a thread that reads the stream has ended");
        let thread = self.threads.get(self.number % self.threads.len()).ok_or_else(ended)?;
        self.piece = thread.full.recv().map_err(|_| ended())??;
        (self.number, self.at) = (self.number + 1, 0);
        Ok(!self.piece.is_empty())
    }
}

impl Read for InFile {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if !self.fill()? {
            return Ok(0);
        }
        let count = self.piece.get(self.at..).unwrap_or_default().read(into)?;
        self.at += count;
        Ok(count)
    }
}

impl Drop for InFile {
    fn drop(&mut self) {
        for Ahead { full, empty, thread } in self.threads.drain(..) {
            // Each of them ends the thread, whatever it waits for.
            drop((full, empty));
            let _ = thread.join();
        }
    }
}

impl Ahead {
    /// Reads the pieces `number`, `number + step` and so on.
    fn start(file: Arc<File>, begin: u64, number: usize, step: usize) -> io::Result<Self> {
        let (filled, full) = channel();
        let (empty, emptied) = channel::<Vec<u8>>();
        for _ in 0..BUFFERS {
            let _ = empty.send(Vec::new());
        }
        let reads = move || {
            let mut at = begin.saturating_add((number * PIECE) as u64);
            while let Ok(mut buffer) = emptied.recv() {
                buffer.resize(PIECE, 0);
                let read = read_full(&file, &mut buffer, at).map(|count| {
                    buffer.truncate(count);
                    buffer
                });
                let is_last = read.as_ref().map_or(true, |buffer| buffer.len() < PIECE);
                if filled.send(read).is_err() || is_last {
                    break;
                }
                at = at.saturating_add((step * PIECE) as u64);
            }
        };
        let thread = thread::Builder::new().name(format!("stream read {number}")).spawn(reads)?;
        Ok(Self { full, empty, thread })
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match Bytes::read_at(file, rest, at.saturating_add(done as u64))? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// Bytes that one call reads. With fewer, the threads wake each other too often.
const PIECE: usize = 1 << 20;
/// More do not read faster from the page cache of two processors; a disk that needs more serves them one after the other.
const THREADS: usize = 2;
/// Of each thread: one is read into while the other is used.
const BUFFERS: usize = 2;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Lengths around whole pieces, read and jumped over in steps that meet their borders in different ways.
    #[test]
    fn every_byte_comes_once_and_in_order() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE, 5 * PIECE + 9] {
            let bytes: Vec<u8> = (0..=250).cycle().take(length).collect();
            let file = Arc::new(tempfile::tempfile().expect("a file"));
            file.write_all_at(&bytes, 77).expect("written");
            for (read, jump) in [(128, 0), (8, 4096), (PIECE * 2, 1), (3, PIECE + 5)] {
                let mut stream = InFile::new(&file, 77).expect("threads");
                let (mut at, mut buffer) = (0, vec![0; read]);
                loop {
                    let count = stream.read(&mut buffer).expect("read");
                    assert!(bytes[at..].starts_with(&buffer[..count]), "{length} {read} {jump} at {at}");
                    at += count;
                    let jumped = stream.skip(jump as u64).expect("jumped");
                    at += usize::try_from(jumped).expect("small");
                    if count == 0 {
                        break;
                    }
                }
                assert_eq!((at, stream.skip(1).expect("at the end")), (length, 0));
            }
        }
    }

    #[test]
    fn stream_that_is_not_read_to_its_end_ends_its_threads() {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        file.set_len(1 << 30).expect("a hole");
        let mut stream = InFile::new(&file, 0).expect("threads");
        assert_eq!(stream.read(&mut [0; 10]).expect("read"), 10);
        drop(stream);
        assert_eq!(Arc::strong_count(&file), 1, "the threads were joined");
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let folder = Arc::new(File::open("/").expect("a folder"));
        let error = InFile::new(&folder, 0).expect("threads").read(&mut [0; 8]).expect_err("a folder");
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
    }
}
