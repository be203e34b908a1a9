//! Writes a plan: to a file by several threads, to a pipe in order.
//!
//! ```text
//! file: head and tables first ─ N threads: next 64 MiB of memory ─ its present pages ─ read, write at their positions
//! pipe: one piece after the other, zeros included
//! ```
//!
//! The threads end with the last piece, the first error of any of them, or the stop; they are joined before the call returns.

use std::{
    fs::File,
    io::{self, Write},
    num::NonZero,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    thread,
};

use multifd::channel::Stop;
use qemu_stream::physical::{PhysicalAddress, PhysicalMemory, PhysicalRange};

use super::plan::{Piece, Plan};

/// What is written.
pub(super) struct Writer<'a> {
    pub(super) memory: &'a PhysicalMemory,
    pub(super) plan: &'a Plan<'a>,
    pub(super) stop: &'a Stop,
}

/// Memory that one thread writes at once.
#[derive(Clone, Copy)]
struct Job {
    range: PhysicalRange,
    position: u64,
    /// Whether only its present pages are in the file.
    packed: bool,
}

impl Writer<'_> {
    /// Writes all of it to an empty file, in which zeros are holes. Returns the bytes of memory that were written.
    pub(super) fn file(&self, file: &File, threads: NonZero<u8>) -> io::Result<u64> {
        file.set_len(self.plan.length())?;
        let mut jobs = Vec::new();
        for (position, piece) in self.plan.pieces() {
            match piece {
                Piece::Zeros(_) => {}
                Piece::Bytes(bytes) => file.write_all_at(bytes, *position)?,
                Piece::Table(table) => {
                    let mut at = *position;
                    table.make(&mut |bytes| {
                        self.check()?;
                        file.write_all_at(bytes, at)?;
                        at += bytes.len() as u64;
                        Ok(())
                    })?;
                }
                Piece::Memory(range) => jobs.extend(self.jobs(range, *position)),
                Piece::Packed(range, _) => {
                    jobs.push(Job { range: *range, position: *position, packed: true });
                }
            }
        }
        self.memory_to(file, &jobs, threads)
    }

    fn jobs<'a>(&'a self, range: &'a PhysicalRange, position: u64) -> impl Iterator<Item = Job> + 'a {
        let starts = (range.start.0..=range.last().0).step_by(JOB);
        starts.flat_map(move |start| {
            let length = (range.last().0 - start + 1).min(JOB as u64);
            let pieces = self.memory.map().pieces(PhysicalAddress(start), length);
            pieces.map(move |range_of_job| Job {
                position: position + (range_of_job.start.0 - range.start.0),
                range: range_of_job,
                packed: false,
            })
        })
    }

    fn memory_to(&self, file: &File, jobs: &[Job], threads: NonZero<u8>) -> io::Result<u64> {
        // Relaxed, all of them: each number is taken once, and the end of a thread orders the rest.
        let (next, written, failed) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let writes = || -> io::Result<()> {
            let mut buffer = vec![0; BUFFER];
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let mut packed_at = job.position;
                for piece in self.memory.present(&job.range, BUFFER as u64) {
                    if failed.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    self.check()?;
                    let bytes = self.load(&piece, &mut buffer)?;
                    let at = if job.packed {
                        packed_at
                    } else {
                        job.position + (piece.start.0 - job.range.start.0)
                    };
                    file.write_all_at(bytes, at)?;
                    packed_at += piece.length;
                    written.fetch_add(piece.length, Ordering::Relaxed);
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let started: Vec<_> = (0..threads.get())
                .map(|number| {
                    let writes = || writes().inspect_err(|_| failed.store(true, Ordering::Relaxed));
                    thread::Builder::new().name(format!("export {number}")).spawn_scoped(scope, writes)
                })
                .collect();
            let ended = started
                .into_iter()
                .map(|thread| thread?.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))));
            // All are joined; the first error is returned.
            ended.collect::<Vec<_>>().into_iter().collect::<io::Result<()>>()
        })?;
        Ok(written.into_inner())
    }

    /// Writes all of it in order.
    pub(super) fn stream(&self, out: &mut impl Write) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let zeros = vec![0; BUFFER];
        let zeros = |out: &mut dyn Write, mut length: u64| -> io::Result<()> {
            while length > 0 {
                self.check()?;
                let count = usize::try_from(length).unwrap_or(BUFFER).min(BUFFER);
                out.write_all(zeros.get(..count).unwrap_or_default())?;
                length -= count as u64;
            }
            Ok(())
        };
        for (_, piece) in self.plan.pieces() {
            match piece {
                Piece::Bytes(bytes) => out.write_all(bytes)?,
                Piece::Zeros(length) => zeros(out, *length)?,
                Piece::Table(table) => table.make(&mut |bytes| {
                    self.check()?;
                    out.write_all(bytes)
                })?,
                Piece::Memory(range) | Piece::Packed(range, _) => {
                    let packed = matches!(piece, Piece::Packed(..));
                    let mut at = range.start.0;
                    for piece in self.memory.present(range, BUFFER as u64) {
                        if !packed {
                            zeros(out, piece.start.0 - at)?;
                        }
                        self.check()?;
                        out.write_all(self.load(&piece, &mut buffer)?)?;
                        at = piece.start.0 + piece.length;
                    }
                    if !packed {
                        zeros(out, range.length - (at - range.start.0))?;
                    }
                }
            }
        }
        out.flush()
    }

    fn load<'b>(&self, piece: &PhysicalRange, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
        let bytes = buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
        self.memory.read(piece.start, bytes)?;
        Ok(bytes)
    }

    fn check(&self) -> io::Result<()> {
        if self.stop.is_stopped() { Err(io::Error::other("it was cancelled")) } else { Ok(()) }
    }
}

/// Bytes that are read and written at once.
const BUFFER: usize = 1 << 20;
/// Bytes of memory that a thread writes before it takes the next ones.
const JOB: usize = 64 << 20;
