//! One set of connections: from the opening, or the return after a broken connection, to SHUT.
//!
//! ```text
//! multifdreplies ─▶ Replies, Schedule ─▶ multifdwalk_N ──▶ main
//!                                    └─▶ multifdpages_N ─▶ preempt
//! ```
//!
//! The first error fails the stop of the session, which closes the schedule and shuts the connections down. So every thread ends.

use std::{
    sync::{Arc, Mutex, OnceLock},
    thread::{self, Builder},
};

use multifd::{
    Error, Sender,
    channel::{Connect, Context, Stop, Stream, Wake},
    postcopy::{PageRun, Schedule},
    ram::PageBitmap,
};

use super::{
    contents::Contents,
    failure::{GuestAt, PostcopyError},
    opening::{ask_for_bitmap, resume},
    pages::{PageWriter, ReadPages, unread},
    replies::{Replies, Sent},
    requests::connect,
    serve::Carry,
    session::{Alarm, Channels, Session},
};
use crate::outgoing::return_path::Peer;

/// How a session begins.
pub(super) enum Begin<'a> {
    /// With the start of the guest.
    Start(&'a dyn Connect),
    /// With a destination that is paused.
    Resume(&'a dyn Connect, Option<Channels>),
    /// After the passes of a guest that ran here.
    Switched(Box<Switch>),
}

/// What the passes of a guest have left behind.
pub(super) struct Switch {
    pub(super) main: Stream,
    pub(super) peer: Peer,
    /// The pages that the destination has kept.
    pub(super) kept: Vec<PageBitmap>,
    pub(super) carriers: Carriers,
}

/// What carries the pages after the passes.
pub(super) enum Carriers {
    /// Main, and a connection for requested pages if there is one.
    Main(Option<Stream>),
    /// Channels.
    Channels(Sender),
}

/// Serves the destination until its SHUT.
pub(super) fn run(source: &Contents, outer: &Stop, begin: Begin<'_>) -> Result<(), PostcopyError> {
    let context = |stop: &Stop| source.options.context(stop);
    let connected = |connector: &dyn Connect, serve: &dyn Fn(&Session<'_>) -> Result<(), Error>| {
        let replies = Replies::new(source.machine.blocks(), &source.counts, source.always_speaks);
        let stop = Stop::new();
        let linked = outer.watch_failure(Arc::new(Cancels(stop.clone())));
        let stream = stop.check().and_then(|()| connect(connector, &context(&stop)));
        let ran = stream.and_then(|stream| {
            serve_stream(
                source,
                &stop,
                &replies,
                context(&stop),
                stream,
                |_| (),
                |session, ()| serve(session),
            )
        });
        drop(linked);
        ended(ran, &replies, outer)
    };
    match begin {
        Begin::Start(connector) => connected(connector, &|session| session.start(connector)),
        Begin::Resume(connector, channels) => {
            connected(connector, &|session| session.resume(connector, channels.clone()))
        }
        Begin::Switched(switch) => {
            let Switch { mut main, peer, kept, carriers } = *switch;
            main.unread(peer.unread);
            let replies = Replies::new(source.machine.blocks(), &source.counts, peer.always_speaks);
            replies.sends(Sent::Package);
            // The stop of the passes, which their channels have as well.
            let prepare = |session: &Session<'_>| session.schedule(&kept);
            let serve =
                |session: &Session<'_>, schedule: Arc<Schedule>| session.switched(&schedule, carriers);
            let ran = serve_stream(source, outer, &replies, context(outer), main, prepare, serve);
            ended(ran, &replies, outer)
        }
    }
}

fn ended(ran: Result<(), Error>, replies: &Replies<'_>, outer: &Stop) -> Result<(), PostcopyError> {
    ran.map_err(|error| {
        let guest = if replies.may_have_started() { GuestAt::Destination } else { GuestAt::Source };
        let (is_confirmed, error) = (replies.has_started(), outer.error().unwrap_or(error));
        PostcopyError { guest, is_confirmed, error }
    })
}

/// Starts the thread for replies, and does the rest of a session. `prepare` comes before the first reply is read.
fn serve_stream<T>(
    source: &Contents,
    stop: &Stop,
    replies: &Replies<'_>,
    context: Context,
    stream: Stream,
    prepare: impl FnOnce(&Session<'_>) -> T,
    serve: impl FnOnce(&Session<'_>, T) -> Result<(), Error>,
) -> Result<(), Error> {
    let waker = stream.waker();
    let broken = stop.watch_failure(waker.clone());
    let (reader, writer) = stream.split().map_err(|error| Error::io("use the connection", error))?;
    let main = PageWriter::main(writer, source.machine.blocks(), source.machine.section());
    let (closes, unreadable) = (OnceLock::new(), Mutex::new(None));
    let stop = stop.clone();
    let session = Session { source, context, stop, replies, main: &main, closes, unreadable };
    let prepared = prepare(&session);
    let served = thread::scope(|scope| {
        let reads = Builder::new().name("multifdreplies".into());
        let reads = reads.spawn_scoped(scope, || {
            let _alarm = Alarm(&session.stop);
            replies.read(reader, &session.stop);
        });
        // Otherwise the end of this scope would wait for a thread that nobody wakes.
        let _alarm = Alarm(&session.stop);
        let reads = reads.map_err(|error| Error::io("start a thread", error))?;
        let served = serve(&session, prepared);
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
    fn start(&self, connector: &dyn Connect) -> Result<(), Error> {
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
        let preempt = self.preempt(connector)?;
        self.write(rest)?;
        self.send_first()?;
        self.write(&machine.discards(&there))?;
        // A destination that does not accept the machine, or post-copy, ends before it could start the guest.
        let ready = self.replies.ready(source.options.stall_timeout);
        ready.map_err(|why| self.missing(why, "PONG 2"))?;
        self.replies.sends(Sent::Package);
        self.write(&machine.switch(false))?;
        self.serve(&schedule, Carry::Main(preempt))
    }

    /// Sends the pages that the destination has not kept. The package was written.
    fn switched(&self, schedule: &Arc<Schedule>, carriers: Carriers) -> Result<(), Error> {
        let carry = match carriers {
            Carriers::Main(requests) => Carry::Main(requests.map(|stream| self.of_requests(stream))),
            Carriers::Channels(sender) => Carry::Channels(sender),
        };
        tracing::debug!(?carry, "post-copy");
        self.serve(schedule, carry)
    }

    /// Sends the pages that the destination lacks.
    fn resume(&self, connector: &dyn Connect, channels: Option<Channels>) -> Result<(), Error> {
        let source = self.source;
        self.replies.continues(source.is_confirmed);
        // Before anything is sent: QEMU 7.2 ends with a signal if it is told to resume and lacks this connection.
        let preempt = self.preempt(connector)?;
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
        // Not earlier: the destination expects them after it has answered.
        let carry = match channels {
            Some(channels) => Carry::Channels(self.connect_channels(channels)?),
            None => Carry::Main(preempt),
        };
        self.serve(&schedule, carry)
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
    fn preempt(&self, connector: &dyn Connect) -> Result<Option<PageWriter<'_>>, Error> {
        if !self.source.options.preempt {
            return Ok(None);
        }
        let stream = connect(connector, &self.context)?;
        Ok(Some(self.of_requests(stream)))
    }

    fn of_requests(&self, stream: Stream) -> PageWriter<'_> {
        PageWriter::of_requests(stream, self.source.machine.blocks())
    }
}

/// The session's stop, cancelled with the caller's.
struct Cancels(Stop);

impl Wake for Cancels {
    fn wake(&self) {
        self.0.cancel();
    }
}

/// Bytes that every socket accepts without a reader, and that identify main.
const HEADER: usize = 64;
