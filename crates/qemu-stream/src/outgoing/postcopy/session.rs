//! One set of connections: from the opening, or the return after a broken connection, to SHUT.
//!
//! ```text
//! multifdreplies ─▶ Replies, Schedule ─▶ multifdwalk_N ──▶ main
//!                                    └─▶ multifdpages_N ─▶ preempt
//! ```
//!
//! The first error fails the stop of the session, which closes the schedule and shuts the connections down. So every thread ends.

use std::{
    io, ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread::{self, Builder, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use multifd::{
    Error,
    channel::{Connect, Context, Stop, Stream, Wake, Watch},
    postcopy::{Lane, PageRun, Schedule},
    ram::PageBitmap,
};

use super::{
    contents::Contents,
    failure::{GuestAt, PostcopyError},
    opening::{ask_for_bitmap, resume},
    pages::{PageWriter, ReadPages, Unreadable, unread},
    replies::{Missing, Replies, Sent},
};
use crate::{error, outgoing::writer::failed};

/// How a session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// With the start of the guest.
    Start,
    /// With a destination that is paused.
    Resume,
}

/// What the threads of a session share.
struct Session<'a> {
    source: &'a Contents,
    connector: &'a dyn Connect,
    context: Context,
    stop: Stop,
    replies: &'a Replies<'a>,
    main: &'a PageWriter<'a>,
    /// Closes the schedule at the stop, until all threads have ended.
    closes: OnceLock<Watch>,
    /// The first page that could not be read, and the number of such pages.
    unreadable: Mutex<Option<(Unreadable, u64)>>,
}

/// Connects, and serves the destination until its SHUT.
pub(super) fn run(
    source: &Contents,
    connector: &dyn Connect,
    outer: &Stop,
    begin: Begin,
) -> Result<(), PostcopyError> {
    let replies = Replies::new(source.machine.blocks(), &source.counts);
    let stop = Stop::new();
    let linked = outer.watch_failure(Arc::new(Cancels(stop.clone())));
    let ran = connected(source, connector, &stop, &replies, begin);
    drop(linked);
    ran.map_err(|error| {
        let guest = if replies.may_have_started() { GuestAt::Destination } else { GuestAt::Source };
        PostcopyError { guest, error: outer.error().unwrap_or(error) }
    })
}

fn connected(
    source: &Contents,
    connector: &dyn Connect,
    stop: &Stop,
    replies: &Replies<'_>,
    begin: Begin,
) -> Result<(), Error> {
    stop.check()?;
    let context = Context::new(stop)
        .connect_timeout(source.options.connect_timeout)
        .stall_timeout(source.options.stall_timeout)
        // Small buffers: a request waits behind what is in them.
        .channels(u8::MAX);
    let stream = connect(connector, &context)?;
    let waker = stream.waker();
    let broken = stop.watch_failure(waker.clone());
    let (reader, writer) = stream.split().map_err(|error| Error::io("use the connection", error))?;
    let main = PageWriter::main(writer, source.machine.blocks(), source.machine.section());
    let (closes, unreadable) = (OnceLock::new(), Mutex::new(None));
    let stop = stop.clone();
    let session = Session { source, connector, context, stop, replies, main: &main, closes, unreadable };
    let served = thread::scope(|scope| {
        let reads = Builder::new().name("multifdreplies".into());
        let reads = reads.spawn_scoped(scope, || {
            let _alarm = Alarm(&session.stop);
            replies.read(reader, &session.stop);
        });
        // Otherwise the end of this scope would wait for a thread that nobody wakes.
        let _alarm = Alarm(&session.stop);
        let reads = reads.map_err(|error| Error::io("start a thread", error))?;
        let served = match begin {
            Begin::Start => session.start(),
            Begin::Resume => session.resume(),
        };
        let served = served.map_err(|error| session.explained(error));
        // The thread ends with the connection.
        waker.wake();
        let _ = reads.join();
        served
    });
    drop(broken);
    served
}

impl Session<'_> {
    /// Starts the guest, and sends its pages.
    fn start(&self) -> Result<(), Error> {
        let (source, machine) = (self.source, &self.source.machine);
        let there = source.blocks.iter().zip(&source.first).map(|((_, block), first)| {
            let there = PageBitmap::new(block.pages());
            if block.is_ignored() {
                // It is not sent: the destination shares its memory.
                there.fill();
            }
            first.set_runs().for_each(|(first, count)| there.set_run(first, count));
            there
        });
        let there: Vec<_> = there.collect();
        let schedule = self.schedule(&there);
        let opening = machine.opening(source.options.system(machine.page_size()));
        let (header, rest) = opening.split_at(opening.len().min(HEADER));
        // QEMU 7.2 reads nothing before it has both connections, and takes the first one for main. QEMU 10.0 knows main by its
        // first bytes.
        self.write(header)?;
        let preempt = self.preempt()?;
        self.write(rest)?;
        self.send_first()?;
        self.write(&machine.discards(&there))?;
        // A destination that does not accept the machine, or post-copy, ends before it could start the guest.
        let ready = self.replies.ready(source.options.stall_timeout);
        ready.map_err(|why| self.missing(why, "PONG 2"))?;
        self.replies.sends(Sent::Package);
        self.write(&machine.switch())?;
        self.serve(&schedule, preempt)
    }

    /// Sends the pages that the destination lacks.
    fn resume(&self) -> Result<(), Error> {
        let source = self.source;
        self.replies.continues();
        // Before anything is sent: QEMU 7.2 ends with a signal if it is told to resume and lacks this connection.
        let preempt = self.preempt()?;
        let (mut ask, mut asked) = (Vec::new(), Vec::new());
        for (index, _, entry) in source.sent() {
            ask_for_bitmap(&entry.name, &mut ask);
            asked.push(index);
        }
        self.replies.asks(&asked);
        self.write(&ask)?;
        let limit = source.options.stall_timeout;
        let bitmaps = self.replies.bitmaps(&asked, limit);
        let mut bitmaps = bitmaps.map_err(|why| self.missing(why, "the bitmaps of received pages"))?;
        let there = source.blocks.iter().map(|(index, block)| {
            // Blocks that were not asked for have nothing to send.
            bitmaps.remove(&index).unwrap_or_else(|| PageBitmap::full(block.pages()))
        });
        let schedule = self.schedule(&there.collect::<Vec<_>>());
        self.replies.resumes();
        self.write(&resume())?;
        self.replies.resumed(limit).map_err(|why| self.missing(why, "RESUME_ACK"))?;
        self.serve(&schedule, preempt)
    }

    /// The schedule of all pages but those that are `there`. Requests go to it from now on.
    fn schedule(&self, there: &[PageBitmap]) -> Arc<Schedule> {
        let source = self.source;
        let shapes = source.shapes();
        let walk = source.blocks.iter().map(|(_, block)| {
            let walk = PageBitmap::new(block.pages());
            if !block.is_ignored() {
                walk.merge(block.present_words());
            }
            walk
        });
        let walk: Vec<_> = walk.collect();
        let schedule = Arc::new(Schedule::new(source.machine.page_size(), &shapes, &walk, there));
        source.control.serves(&schedule);
        // Before the first request: the thread that reads them waits for a place if there are very many.
        let _ = self.closes.set(self.stop.watch_failure(schedule.clone()));
        self.replies.serve(schedule.clone());
        schedule
    }

    /// Sends the pages that the guest is expected to need at once.
    fn send_first(&self) -> Result<(), Error> {
        let mut read = ReadPages::default();
        for (block, ram, _) in self.source.sent() {
            let runs = self.source.first.get(block.0).into_iter().flat_map(PageBitmap::set_runs);
            for (first, count) in runs {
                let run = PageRun { block, first, count };
                if let Some((bad, pages)) = read.read(ram, run) {
                    return Err(unread(&self.source.blocks, bad, pages));
                }
                let written = self.main.send(run, &read, false);
                let written = written.map_err(|error| self.write_failed(self.main, error))?;
                self.source.counts.wrote(written);
            }
        }
        Ok(())
    }

    /// The connection for requested pages.
    fn preempt(&self) -> Result<Option<PageWriter<'_>>, Error> {
        if !self.source.options.preempt {
            return Ok(None);
        }
        let stream = connect(self.connector, &self.context)?;
        Ok(Some(PageWriter::of_requests(stream, self.source.machine.blocks())))
    }

    /// Sends all pages, and waits for SHUT.
    fn serve(&self, schedule: &Arc<Schedule>, preempt: Option<PageWriter<'_>>) -> Result<(), Error> {
        self.source.counts.plan(schedule.left());
        let broken = preempt.as_ref().map(|writer| self.stop.watch_failure(writer.waker()));
        let served = thread::scope(|scope| {
            let requests = match &preempt {
                Some(writer) => self.spawn(scope, "multifdpages", Lane::Requests, schedule, writer)?,
                None => Vec::new(),
            };
            let lane = if preempt.is_some() { Lane::Walk } else { Lane::Both };
            let walks = self.spawn(scope, "multifdwalk", lane, schedule, self.main);
            let sent = walks.map(join).and_then(|()| {
                schedule.drained();
                self.stop.check()
            });
            // Every page was sent, so a request that comes now is answered already.
            schedule.close();
            join(requests);
            sent
        });
        for (index, requested) in
            self.source.blocks.iter().map(|(index, _)| index).zip(&self.source.requested)
        {
            schedule.asked(index).into_iter().for_each(|pages| requested.merge(pages.words()));
        }
        served.and_then(|()| self.stop.check())?;
        if let Some((bad, pages)) = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(unread(&self.source.blocks, bad, pages));
        }
        if let Some(writer) = &preempt {
            writer.end().map_err(|error| self.write_failed(writer, error))?;
        }
        self.replies.sends(Sent::End);
        self.write(&self.source.machine.end())?;
        let shut = self.replies.shut(self.source.options.end_timeout);
        let shut = shut.map_err(|why| self.missing(why, "SHUT"));
        // The connection for requested pages stays open until here: a destination takes its end for a broken network.
        drop(broken);
        shut
    }

    fn spawn<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        name: &str,
        lane: Lane,
        schedule: &'s Schedule,
        writer: &'s PageWriter<'s>,
    ) -> Result<Vec<ScopedJoinHandle<'s, ()>>, Error> {
        let start = |number| {
            let named = Builder::new().name(format!("{name}_{number}"));
            let thread = named.spawn_scoped(scope, move || {
                let _alarm = Alarm(&self.stop);
                if let Err(error) = self.work(lane, schedule, writer) {
                    self.stop.fail(self.explained(error));
                }
            });
            thread.map_err(|error| self.stop.fail(Error::io("start a thread", error)))
        };
        (0..READERS).map(start).collect()
    }

    /// Sends what the schedule gives to this lane.
    fn work(&self, lane: Lane, schedule: &Schedule, writer: &PageWriter<'_>) -> Result<(), Error> {
        let mut read = ReadPages::default();
        while let Some(job) = schedule.next(lane, MOST) {
            let sent = self.send(job.run, &mut read, writer);
            schedule.sent(job);
            sent?;
            if let Some(since) = job.requested {
                self.source.counts.answered(Instant::now().saturating_duration_since(since));
            }
        }
        Ok(())
    }

    fn send(&self, run: PageRun, read: &mut ReadPages, writer: &PageWriter<'_>) -> Result<(), Error> {
        let block = self.source.blocks.block(run.block).map_err(Error::from)?;
        if let Some((bad, pages)) = read.read(block, run) {
            self.note_unreadable(bad, pages);
        }
        let whole = self.source.shape(run.block).is_some_and(|shape| shape.host_page > 1);
        let written = writer.send(run, read, whole);
        let written = written.map_err(|error| self.write_failed(writer, error))?;
        self.source.counts.wrote(written);
        Ok(())
    }

    fn note_unreadable(&self, bad: Unreadable, pages: u64) {
        let offset = self.source.blocks.get(bad.block).and_then(|block| block.offset_of(bad.page));
        tracing::error!(block = bad.block.0, ?offset, error = %bad.error, "a page cannot be read and is not sent");
        self.source.counts.unreadable(pages);
        let mut unreadable = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *unreadable {
            Some((_, more)) => *more += pages,
            None => *unreadable = Some((bad, pages)),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        self.main.write(bytes).map_err(|error| self.write_failed(self.main, error))?;
        self.source.counts.other_bytes(bytes.len() as u64);
        Ok(())
    }

    fn write_failed(&self, writer: &PageWriter<'_>, source: io::Error) -> Error {
        if ptr::eq(writer, self.main) {
            self.replies.write_failed(&source);
        }
        let at = error::Place { stream: error::StreamKind::Main, offset: 0 };
        failed(error::Error::Io { at, doing: "write", source })
    }

    /// The error of a wait: the destination's own, if it has ended.
    fn missing(&self, why: Missing, expected: &'static str) -> Error {
        let late = || failed(error::Error::TimedOut { at: Replies::place(), expected });
        match why {
            Missing::Late => late(),
            Missing::Ended => self.replies.error_within(Duration::ZERO).unwrap_or_else(late),
        }
    }

    /// The error to report: that of the session's stop if there is one; for a broken connection, what the destination has
    /// reported, or reports within a moment.
    fn explained(&self, error: Error) -> Error {
        if let Some(first) = self.stop.error() {
            return first;
        }
        let said = if error.fault() == multifd::Fault::Connection {
            self.replies.error_within(MOMENT)
        } else {
            None
        };
        self.stop.fail(said.unwrap_or(error))
    }
}

/// Fails the stop if the thread that holds it panics: others wait for what it does.
struct Alarm<'a>(&'a Stop);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(Error::text("a thread of this program has panicked"));
        }
    }
}

/// The session's stop, cancelled with the caller's.
struct Cancels(Stop);

impl Wake for Cancels {
    fn wake(&self) {
        self.0.cancel();
    }
}

fn connect(connector: &dyn Connect, context: &Context) -> Result<Stream, Error> {
    let link = connector.connect(context);
    let link = link.map_err(|error| Error::io(format!("connect to {}", connector.target()), error))?;
    Ok(Stream::new(link, context))
}

fn join(threads: Vec<ScopedJoinHandle<'_, ()>>) {
    // A thread that panicked has failed the stop.
    threads.into_iter().for_each(|thread| _ = thread.join());
}

/// Threads of a connection: the number of reads of a slow file at once.
const READERS: u8 = 4;
/// Pages of a piece of the walk. A request waits behind one piece at most on each connection.
const MOST: u64 = 32;
/// Bytes that every socket accepts without a reader, and that identify main.
const HEADER: usize = 64;
const MOMENT: Duration = Duration::from_millis(300);
