//! Identifies incoming connections, in any order: each is main or a channel.
//!
//! Only the first bytes differ: main begins with the magic of its stream, a channel with its initial packet. Each
//! connection is read by a thread of its own with a time limit, so a silent one does not delay others; the thread of a
//! channel then becomes the channel's thread. A connection that is neither main nor a channel is reported and dropped, and
//! the migration continues. The migration fails instead if this connection is the only possible one, as with a command, or
//! if it may have been a channel whose pages would be missing: it began like a channel, or the number of channels is not
//! known and it comes from main's host and connected after main.
//!
//! One more connection has no first bytes of its own: that of postcopy-preempt. It is the one that remains, after the caller has
//! [reported](super::Receiver::expect_preempt) that there may be one.

use std::{io, sync::Arc};

use super::{
    admit,
    entry::{Newcomer, Origin},
    shared::{PreemptReader, Resumed, Shared},
    worker,
};
use crate::{
    channel::{Context, Link, Stream, Wake, Watch, deadline},
    error::{Error, Fault, Result, Unsupported, Violation},
    ram::PartMut,
    sync_types::{Builder, Instant},
    wire::{INITIAL_LEN, Initial},
};

/// The first bytes of a main stream.
const MAIN_MAGIC: [u8; 4] = *b"QEVM";
/// The first bytes of a main connection with which a source returns: the command RECV_BITMAP.
const RESUMED: [u8; 3] = [8, 0, 10];
/// The first bytes of a handshake record of TLS.
const TLS_HELLO: [u8; 2] = [0x16, 0x03];

/// Creates a thread that identifies the new connection `link`, which was created with `context`.
pub(super) fn identify_in_thread(shared: &Arc<Shared>, link: Box<dyn Link>, context: Context) {
    let Some((origin, open)) = shared.enlist(&*link) else { return };
    let thread = Builder::new().name("multifdrecv_new".into()).spawn({
        let (shared, origin) = (shared.clone(), origin.clone());
        let span = tracing::Span::current();
        move || {
            // Dropped after the link.
            let _open = open;
            span.in_scope(|| identify(&shared, link, &context, origin));
        }
    });
    match thread {
        Ok(thread) => shared.keep(thread),
        Err(error) => {
            let (peer, number) = (origin.peer.clone(), origin.number);
            shared.note_lost(origin);
            shared.identified(number);
            // Connections that say nothing may have all threads that this process may start.
            if shared.close_silent() {
                tracing::warn!(peer, %error, "a connection is dropped, because no thread can be started for it");
            } else {
                shared.stop.fail(Error::io("start a thread for a connection", error));
            }
        }
    }
}

fn identify(shared: &Arc<Shared>, mut link: Box<dyn Link>, context: &Context, origin: Origin) {
    let _alarm = shared.stop.alarm("a channel's thread");
    let (peer, number) = (origin.peer.clone(), origin.number);
    let wake: Arc<dyn Wake> = link.waker();
    // Until the connection is identified, the end of the migration shuts it down.
    let greeting = shared.stop.watch(wake.clone());
    let first = read_first_bytes(shared, &mut *link, &origin);
    if !shared.lock().keep(number) {
        tracing::debug!(peer, "a silent connection was closed to make room for another one");
        shared.note_lost(origin);
        // Not earlier: main must not pass a sync point in between.
        shared.identified(number);
        return;
    }
    match first {
        Ok(Kind::Main(seen)) => {
            // From here on waits for the stop end without a shutdown, so that this side can still report its failure to the
            // peer.
            let watch = shared.stop.watch_failure(link.recv_waker());
            drop(greeting);
            context.stall_timer.identified();
            shared.main_has_come(origin, Stream::resumed(link, context, seen), watch, wake);
            shared.identified(number);
        }
        Ok(Kind::Resumed(seen)) => {
            let watch = shared.stop.watch_failure(link.recv_waker());
            drop(greeting);
            context.stall_timer.identified();
            let stream = Stream::resumed(link, context, seen);
            shared.has_resumed(Resumed { origin, stream, watch, wake });
            shared.identified(number);
        }
        Ok(Kind::Channel(initial)) => {
            let id = initial.id;
            let _watch = shared.stop.watch_failure(wake.clone());
            let welcome = shared.register(Newcomer { origin, initial, wake });
            // Not earlier: main must not pass a sync point in between.
            shared.identified(number);
            if !welcome {
                return;
            }
            drop(greeting);
            // The name is only shown by tools such as top. Without it the thread keeps its old name.
            let name = std::ffi::CString::new(format!("multifdrecv_{id}")).unwrap_or_default();
            let _ = rustix::thread::set_name(&name);
            tracing::debug!(channel = id.0, peer, "multifd_recv_new_channel");
            context.stall_timer.identified();
            worker::run(id, number, shared, link);
        }
        Ok(Kind::Preempt(seen)) => {
            let _ = rustix::thread::set_name(c"multifdpreempt");
            // It is shut down when the migration ends, as long as it is watched.
            let silent = seen.is_empty();
            let stream = Stream::resumed(link, context, seen);
            let reader = shared.takes_preempt(&origin, wake);
            // Not earlier: main must not find that there is no such connection in between.
            shared.identified(number);
            context.stall_timer.identified();
            match reader {
                Some(read) => shared.preempt_has_come(read, &peer, stream),
                None if silent => tracing::debug!(peer, "a connection has ended without a byte"),
                None => {
                    tracing::warn!(peer, "a second connection that does not say what it is is dropped");
                }
            }
            drop(greeting);
        }
        Err(Refused { error, a_channel }) if a_channel || shared.lock().roster.single => {
            shared.stop.fail(error.at(format_args!("connection from {peer}")));
            shared.identified(number);
        }
        Err(Refused { error, .. }) => {
            if admit::is_unnoticed(&error) {
                shared.note_lost(origin);
            }
            // Not earlier: main must not pass a sync point in between.
            shared.identified(number);
            let cause =
                std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            tracing::warn!(
                peer,
                "a connection that is neither main nor a channel is dropped: {error}{cause}"
            );
            shared.refused(error.at(format_args!("connection from {peer}")));
        }
    }
}

/// A connection that is dropped.
struct Refused {
    error: Error,
    /// It began like a channel.
    a_channel: bool,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, a_channel: false }
    }
}

enum Kind {
    /// Main, with the bytes read so far.
    Main(Vec<u8>),
    /// The main connection of a source that returns, with the bytes read so far.
    Resumed(Vec<u8>),
    Channel(Initial),
    /// The connection of postcopy-preempt, with the bytes read so far.
    Preempt(Vec<u8>),
}

fn read_first_bytes(shared: &Shared, link: &mut dyn Link, origin: &Origin) -> Result<Kind, Refused> {
    let limit = shared.options.greeting_timeout;
    // If it is the only connection, it delays no others, and may need a long time before it sends its first bytes.
    let (peer, mut end) = (link.peer(), (!shared.lock().roster.single).then(|| deadline(limit)));
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::TimedOut => Error::TimedOut { what: format!("{peer} did not identify itself"), limit },
        _ => Error::io(format!("receive the first bytes of {peer}"), error),
    };
    let mut magic = [0; MAIN_MAGIC.len()];
    let mut have = 0;
    match read_up_to(link, &mut magic, &mut have, end) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut && have == 0 && shared.may_preempt(origin) => {
            // It may be silent up to the end, and must not be closed to make room.
            let mut state = shared.lock();
            state.keep(origin.number);
            state.source.preempt.has_silent = true;
            state.source.preempt.wakes.push(link.waker());
            drop(state);
            shared.identified(origin.number);
            link.set_recv_timeout(None).map_err(failed)?;
            read_up_to(link, &mut magic, &mut have, None).map_err(failed)?;
            if have == 0 {
                return Ok(Kind::Preempt(Vec::new()));
            }
            end = end.map(|_| deadline(limit));
        }
        read => read.map_err(failed)?,
    }
    if magic == MAIN_MAGIC {
        link.set_recv_timeout(None).map_err(failed)?;
        return Ok(Kind::Main(MAIN_MAGIC.to_vec()));
    }
    if magic.starts_with(&RESUMED) && shared.may_resume(origin) {
        link.set_recv_timeout(None).map_err(failed)?;
        return Ok(Kind::Resumed(magic.to_vec()));
    }
    if magic.starts_with(&TLS_HELLO) {
        return Err(Error::from(Unsupported::Tls).into());
    }
    let mut first = [0; INITIAL_LEN];
    first.iter_mut().zip(magic).for_each(|(into, byte)| *into = byte);
    let a_channel = have == MAIN_MAGIC.len() && Initial::is_begun_by(&first);
    if !a_channel && shared.may_preempt(origin) {
        link.set_recv_timeout(None).map_err(failed)?;
        return Ok(Kind::Preempt(magic.iter().copied().take(have).collect()));
    }
    read_up_to(link, &mut first, &mut have, end)
        .map_err(|error| Refused { error: failed(error), a_channel })?;
    if have < INITIAL_LEN {
        let (expected, found) = (INITIAL_LEN as u64, have as u64);
        let error = Violation::Cut { what: "the initial packet", expected, found }.into();
        return Err(Refused { error, a_channel });
    }
    let initial = Initial::decode(&first).map_err(|error| Refused { error: error.into(), a_channel })?;
    link.set_recv_timeout(None).map_err(failed)?;
    Ok(Kind::Channel(initial))
}

/// Reads until `buffer` is full, or until `end`, if there is one. `have` is the number of bytes in it, before and after,
/// also after an error. A peer that sends few bytes at a time does not extend the time limit.
fn read_up_to(
    link: &mut dyn Link,
    buffer: &mut [u8],
    have: &mut usize,
    end: Option<Instant>,
) -> io::Result<()> {
    while let Some(room) = buffer.get_mut(*have..).filter(|room| !room.is_empty()) {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        link.set_recv_timeout(left)?;
        match link.recv(&mut [PartMut::from(room)]) {
            Ok(0) => break,
            Ok(some) => *have += some,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Shared {
    /// The connection is identified, or never will be.
    fn identified(&self, number: u64) {
        let mut state = self.lock();
        let at = state.roster.unidentified.iter().position(|entry| entry.origin.number == number);
        let entry = at.map(|at| state.roster.unidentified.remove(at));
        self.changed.notify_all();
        drop(state);
        // The last owner of the connection closes it.
        drop(entry);
    }

    /// Takes the reader of the connection of postcopy-preempt, if there is one that nobody has taken. `wake` shuts the
    /// connection down.
    fn takes_preempt(&self, origin: &Origin, wake: Arc<dyn Wake>) -> Option<PreemptReader> {
        let mut state = self.lock();
        // The source may have returned since the connection was identified.
        if !self.may_be_missed(&state, origin) {
            return None;
        }
        let preempt = &mut state.source.preempt;
        let reader = preempt.reader.take()?;
        preempt.is_read = true;
        preempt.wakes.push(wake);
        Some(reader)
    }

    /// A connection is that of postcopy-preempt: reads it to its end.
    fn preempt_has_come(&self, read: PreemptReader, peer: &str, stream: Stream) {
        tracing::debug!(peer, "the connection of postcopy-preempt");
        // Without blocks there is no page that could come on it.
        let read = self.arrived.get().map_or(Ok(()), |arrived| read(arrived, stream));
        match read {
            Ok(()) => tracing::debug!(peer, "the connection of postcopy-preempt has ended"),
            Err(error) if self.stop.is_stopped() || self.survives(&error) => {
                tracing::debug!(peer, %error, "the connection of postcopy-preempt has ended");
                self.loses_requested();
            }
            Err(error) => drop(self.stop.fail(error.at(format_args!("connection from {peer}")))),
        }
        // After the stop, so that main never finds neither.
        self.lock().source.preempt.is_read = false;
        self.changed.notify_all();
    }

    /// The connection for requested pages has broken. If the guest runs here, some of them may be lost, and the source does not know that:
    /// everything is shut down, so that it returns and learns what is missing.
    fn loses_requested(&self) {
        let state = self.lock();
        let matters = state.source.may_resume && !state.life.sealed && !state.life.stopped;
        drop(state);
        if matters && self.arrived.get().is_some_and(|arrived| arrived.late().is_some()) {
            self.break_off();
        }
    }

    /// Whether the source can return after this error.
    fn survives(&self, error: &Error) -> bool {
        error.fault() == Fault::Connection && self.lock().source.may_resume
    }

    /// The connection from `origin` is main.
    fn main_has_come(&self, origin: Origin, main: Stream, watch: Watch, wake: Arc<dyn Wake>) {
        let mut state = self.lock();
        if state.roster.main.is_some() || state.life.sealed {
            tracing::warn!(peer = origin.peer, "a second main connection is dropped");
            return;
        }
        let opened = self.main_from(&mut state, origin);
        drop(state);
        // Before the caller gets main: it may rely on the channels that are connected.
        let _ = self.finish_opening(opened);
        let mut state = self.lock();
        state.main.stream = Some(main);
        state.main.watch = Some(watch);
        state.main.wake = Some(wake);
    }
}
