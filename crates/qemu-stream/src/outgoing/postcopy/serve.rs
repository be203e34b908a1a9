//! Sends the pages of a session: over main and the connection for requested pages, or over channels.

use std::{
    fmt,
    sync::{Arc, PoisonError},
    thread::{self, Builder, Scope, ScopedJoinHandle},
    time::Instant,
};

use multifd::{
    Error, Sender,
    postcopy::{Cost, Job, Lane, Schedule},
};

use super::{
    opening::bye,
    pages::{PageWriter, ReadPages, unread},
    replies::Sent,
    session::{Alarm, Channels, Session},
};

/// What carries the pages.
pub(super) enum Carry<'a> {
    /// Main, and a connection for requested pages if there is one.
    Main(Option<PageWriter<'a>>),
    /// Channels; one of them carries only requested pages.
    Channels(Sender),
}

impl fmt::Debug for Carry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main(None) => "main",
            Self::Main(Some(_)) => "main and preempt",
            Self::Channels(_) => "channels",
        })
    }
}

impl Session<'_> {
    /// Sends all pages, and waits for SHUT.
    pub(super) fn serve(&self, schedule: &Arc<Schedule>, carry: Carry<'_>) -> Result<(), Error> {
        self.source.counts.plan(schedule.left());
        let served = match carry {
            Carry::Main(preempt) => self.serve_main(schedule, preempt.as_ref()),
            Carry::Channels(sender) => self.serve_channels(schedule, sender),
        };
        for (index, requested) in
            self.source.blocks.iter().map(|(index, _)| index).zip(&self.source.requested)
        {
            schedule.asked(index).into_iter().for_each(|pages| requested.merge(pages.words()));
        }
        served
    }

    /// Sends the pages over the channels.
    fn serve_channels(&self, schedule: &Arc<Schedule>, mut sender: Sender) -> Result<(), Error> {
        // Before the sender is dropped, which cancels.
        self.serve_over(schedule, &mut sender).map_err(|error| self.explained(error))?;
        if let Err(error) = sender.finish() {
            tracing::debug!(%error, "an error after completion");
        }
        Ok(())
    }

    fn serve_over(&self, schedule: &Arc<Schedule>, sender: &mut Sender) -> Result<(), Error> {
        let counts = &self.source.counts;
        counts.follow(sender.counters());
        let answers = counts.clone();
        // No page may arrive before the destination has read the switch, or the return, on main.
        sender.sync()?;
        self.write(&self.source.machine.sync_point())?;
        let served = sender
            .serve(schedule, move |time| answers.answered(time))
            .and_then(|()| sender.sync().map(drop))
            .and_then(|()| self.stop.check());
        counts.unfollow();
        served?;
        sender.all_sent();
        self.replies.sends(Sent::End);
        self.write(&self.source.machine.end(true))?;
        self.wait_for_shut()
    }

    /// Waits until the destination has everything. One of this library learns that its SHUT has arrived.
    fn wait_for_shut(&self) -> Result<(), Error> {
        let shut = self.replies.shut(self.source.options.end_timeout);
        shut.map_err(|why| self.missing(why, "SHUT"))?;
        if self.source.always_speaks {
            // Without it, the destination waits some time for nothing.
            let _ = self.main.write(&bye());
        }
        Ok(())
    }

    /// Connects channels for a destination that has been asked what it lacks.
    pub(super) fn connect_channels(&self, channels: Channels) -> Result<Sender, Error> {
        let Channels { send, connector } = channels;
        let mut sender = Sender::new(send, self.source.blocks.clone(), self.stop.clone())?;
        sender.set_up(connector)?;
        sender.wait_connected()?;
        Ok(sender)
    }

    /// Sends the pages over main and, if they are requested, over `preempt`.
    fn serve_main(&self, schedule: &Arc<Schedule>, preempt: Option<&PageWriter<'_>>) -> Result<(), Error> {
        let broken = preempt.map(|writer| self.stop.watch_failure(writer.waker()));
        let served = thread::scope(|scope| {
            let requests = match preempt {
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
        served.and_then(|()| self.stop.check())?;
        if let Some((bad, pages)) = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(unread(&self.source.blocks, bad, pages));
        }
        if let Some(writer) = preempt {
            writer.end().map_err(|error| self.write_failed(writer, error))?;
        }
        self.replies.sends(Sent::End);
        self.write(&self.source.machine.end(false))?;
        let shut = self.wait_for_shut();
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
            let mut cost = Cost::default();
            let sent = self.send(&job, &mut read, writer, &mut cost);
            schedule.sent(job, cost);
            sent?;
            if let Some(since) = job.requested {
                self.source.counts.answered(Instant::now().saturating_duration_since(since));
            }
        }
        Ok(())
    }

    fn send(
        &self,
        job: &Job,
        read: &mut ReadPages,
        writer: &PageWriter<'_>,
        cost: &mut Cost,
    ) -> Result<(), Error> {
        let begun = Instant::now();
        let block = self.source.blocks.block(job.run.block).map_err(Error::from)?;
        if let Some((bad, pages)) = read.read(block, job.run) {
            self.note_unreadable(bad, pages);
        }
        cost.prepared = begun.elapsed();
        if job.requested.is_none() {
            cost.round_trip = writer.limit_backlog(job.backlog);
        }
        let whole = self.source.shape(job.run.block).is_some_and(|shape| shape.host_page > 1);
        let written = writer.send(job.run, read, whole);
        let written = written.map_err(|error| self.write_failed(writer, error))?;
        self.source.counts.wrote(written);
        Ok(())
    }
}

fn join(threads: Vec<ScopedJoinHandle<'_, ()>>) {
    // A thread that panicked has failed the stop.
    threads.into_iter().for_each(|thread| _ = thread.join());
}

/// Threads of a connection: the number of reads of a slow file at once.
const READERS: u8 = 4;
/// Pages of a piece of the walk. A request waits behind one piece at most on each connection.
const MOST: u64 = 32;
