//! A channel's thread: it takes batch after batch, waits at sync points, and ends with the migration, or when its connection
//! breaks.
//!
//! Its carrier handles a batch: [`packets`](super::packets) sends it over a connection, [`copies`](super::copies)
//! copies it into other blocks.

use std::{io::ErrorKind, time::Duration};

use super::{
    dispatch::{Dispatch, Job},
    given::Given,
    serving::Serving,
    shared::Shared,
};
use crate::{
    batch::{Batch, Kind},
    error::{Error, Fault, Result, chain},
    postcopy::Cost,
    ram::{PageIndex, PageRun},
    sync_types::OnceLock,
    wire::ChannelId,
};

/// How a channel carries batches.
pub(super) trait Carrier {
    /// Carries the pages of `batch`. Returns a batch whose pages are no longer needed, which may be this one.
    fn carry(&mut self, batch: Batch) -> Result<Option<Batch>>;

    /// A sync point: all pages so far were sent, and later pages cannot overtake them.
    fn sync(&mut self) -> Result<()>;

    /// Limits what waits in the connection, if there is one: see [`Link::limit_backlog`](crate::channel::Link::limit_backlog).
    fn limit_backlog(&mut self, _limit: Option<u64>) {}

    /// What was carried since the last call has cost, besides the line.
    fn cost(&mut self) -> Cost {
        Cost::default()
    }

    /// Called when the migration is over, successful or not.
    fn end(self);
}

/// Runs a channel whose carrier is made by `start`. An error ends the whole migration, unless that
/// [continues](Dispatch::lose) without this channel.
pub(super) fn run<C: Carrier>(id: ChannelId, shared: &Shared, start: impl FnOnce() -> Result<C>) {
    let _alarm = shared.stop.alarm("a channel's thread");
    let given = Recorder { id, given: &shared.given };
    if let Err(error) = start().and_then(|carrier| work(id, &shared.dispatch, &given, carrier)) {
        tracing::debug!(channel = id.0, %error, "multifd_send_error");
        let fault = error.fault();
        if fault == Fault::Connection && !is_refusal(&error) && shared.dispatch.lose(id) {
            let error = chain(&error);
            tracing::warn!(channel = id.0, %error, "a channel is broken; the migration continues without it");
            return;
        }
        match fault {
            // A TLS session explains why the peer has closed it, and then main knows no more.
            Fault::Connection if !is_explained(&error) => {
                shared.stop.fail_as_consequence(error.on_channel(id), GRACE)
            }
            _ => shared.stop.fail(error.on_channel(id)),
        };
    }
    tracing::debug!(channel = id.0, "multifd_send_thread_end");
}

fn is_explained(error: &Error) -> bool {
    matches!(error.kind(), Error::Io { source, .. } if source.get_ref().is_some())
}

/// Whether the destination has refused this connection, which is more than a network that fails.
fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), Error::Io { source, .. } if source.kind() == ErrorKind::ConnectionRefused)
}

/// The time in which main can report why the destination fails, before the closed channel becomes the error.
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// Records what a channel is given, before it is sent.
pub(super) struct Recorder<'a> {
    pub(super) id: ChannelId,
    pub(super) given: &'a OnceLock<Given>,
}

impl Recorder<'_> {
    fn record(&self, batch: &Batch) {
        if let Some(given) = self.given.get() {
            given.record(self.id, batch);
        }
    }
}

/// Carries out the jobs of `dispatch` for a connected channel, until the end.
pub(super) fn work<C: Carrier>(
    id: ChannelId,
    dispatch: &Dispatch,
    recorder: &Recorder<'_>,
    mut carrier: C,
) -> Result<()> {
    dispatch.connected();
    let mut done = None;
    loop {
        match dispatch.next(id, done.take()) {
            Job::Batch(batch) => {
                recorder.record(&batch);
                done = carrier.carry(batch)?;
            }
            Job::Sync => {
                carrier.sync()?;
                dispatch.synced(id);
            }
            Job::Serve(serving) => {
                let kept = serve(&serving, dispatch, &mut carrier)?;
                dispatch.served(kept);
            }
            Job::End => {
                carrier.end();
                return Ok(());
            }
            Job::Lost => return Ok(()),
        }
    }
}

/// Sends the share of this channel. Returns a batch that is no longer needed.
fn serve<C: Carrier>(serving: &Serving, dispatch: &Dispatch, carrier: &mut C) -> Result<Option<Batch>> {
    let (share, mut kept) = (serving.share(), None);
    while let Some(job) = serving.next(share) {
        if job.requested.is_none() {
            carrier.limit_backlog(job.backlog);
        }
        let sent = send(&job.run, dispatch, carrier, &mut kept);
        serving.sent(job, carrier.cost(), sent.is_ok());
        sent?;
    }
    carrier.limit_backlog(None);
    Ok(kept)
}

fn send<C: Carrier>(
    run: &PageRun,
    dispatch: &Dispatch,
    carrier: &mut C,
    kept: &mut Option<Batch>,
) -> Result<()> {
    let (mut first, end) = (run.first.0, run.first.0 + run.count);
    while first < end {
        // There is one for each batch that a channel may keep, and one more.
        let mut batch = dispatch.empty(kept.take()).expect("a channel has an empty batch");
        first += batch.push(Kind::Unknown, run.block, PageIndex(first), end - first);
        *kept = carrier.carry(batch)?;
    }
    Ok(())
}
