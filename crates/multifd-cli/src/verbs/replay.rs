//! `multifd replay`: plays the source of a recorded migration to a destination.
//!
//! A thread for each connection reads its bytes from the file and sends them; a second one reads the replies. Connections are opened in
//! their order. With `--fast`, a connection is closed only when the destination has replied as much as in the recording.

use std::{
    io::{self, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use indicatif::BinaryBytes;
use multifd::{
    channel::{Connect, Context, Link, Stop, Wake},
    ram::PartMut,
};
use qemu_stream::{
    error::StreamKind,
    format::{Message, Reader},
    recording::{ConnectionKind, ConnectionNumber, Ending, OneWay, Recording, Side, Timeline},
};

use super::record::send_all;
use crate::{
    args::ReplayArgs,
    interrupt,
    output::{
        outcome::{Failure, While},
        outlet::say,
    },
    stored::Within,
};

/// What all connections share.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: Stop,
}

#[derive(Default)]
struct State {
    /// Bytes of replies that are still to come.
    awaited: u64,
    /// Replies that have ended before.
    error: Option<String>,
    sent: u64,
}

pub(crate) fn run(args: &ReplayArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    args.address.check_connect().map_err(|error| Failure::Usage(error.into()))?;
    let unreadable = |error| args.file.unreadable(error);
    let file = Within::open(&args.file).map_err(|error| args.file.unreadable(error))?;
    let recording = Recording::open(file).map_err(unreadable)?;
    let found = Timeline::of(&recording).map_err(unreadable)?;
    if found.connections.is_empty() {
        return Err(args.file.unreadable("it has no connections").into());
    }
    if found.connections.iter().any(|connection| connection.kind == ConnectionKind::Tls) {
        return Err(While::new(format!("cannot replay {}", args.file), ENCRYPTED).into());
    }
    if found.ending != Ending::Complete && !args.quiet {
        say(
            "warning: the recording ends before the migration, so the destination will not get a complete guest",
        );
    }
    let shared = Shared { state: Mutex::default(), changed: Condvar::new(), stop: stop.clone() };
    shared.lock().awaited = found.connections.iter().map(|connection| connection.destination.bytes).sum();
    let start = Instant::now();
    let context = Context::new(&stop).stall_timeout(Some(STALL));
    let ended = thread::scope(|scope| -> Result<(), Failure> {
        let mut threads = Vec::new();
        for connection in &found.connections {
            if !args.fast {
                stop.pause(connection.opened.saturating_sub(start.elapsed())).map_err(Failure::of)?;
            }
            let opened = args.address.connect(&context).and_then(|link| {
                let waker = link.waker();
                Ok((link.split()?, waker))
            });
            let ((from, to), waker) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    stop.cancel();
                    return Err(While::new(format!("cannot connect to {}", args.address), error).into());
                }
            };
            let number = connection.number;
            let mut way =
                Way { recording: &recording, number, shared: &shared, fast: args.fast, start, waker };
            let replies = way.clone_for_replies();
            let name = format!("play_{}", number.number());
            let sender = thread::Builder::new().name(format!("{name}_there"));
            threads.push(sender.spawn_scoped(scope, move || way.send(to))?);
            let expected = connection.destination.bytes;
            let reader = thread::Builder::new().name(format!("{name}_back"));
            threads.push(reader.spawn_scoped(scope, move || replies.receive(from, expected))?);
        }
        let mut first = Ok(());
        for thread in threads {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")));
            if let (Err(error), true) = (ended, first.is_ok()) {
                first = Err(While::new(format!("cannot replay to {}", args.address), error).into());
            }
        }
        first
    });
    if stop.error().is_some_and(|error| error.is_cancelled()) && ended.is_ok() {
        return Err(Failure::Interrupted);
    }
    ended?;
    let state = shared.lock();
    if !args.quiet {
        let time = start.elapsed();
        say(&format!("replayed {}: {} in {:.3} s", args.file, BinaryBytes(state.sent), time.as_secs_f64()));
    }
    match &state.error {
        None => Ok(()),
        Some(why) => {
            Err(While::new(format!("the destination at {} has failed", args.address), why.clone()).into())
        }
    }
}

/// One connection.
struct Way<'a> {
    recording: &'a Recording<Within>,
    number: ConnectionNumber,
    shared: &'a Shared,
    fast: bool,
    start: Instant,
    waker: Arc<dyn Wake>,
}

impl<'a> Way<'a> {
    fn clone_for_replies(&mut self) -> Way<'a> {
        Way { waker: self.waker.clone(), ..*self }
    }

    /// Sends what the source has sent.
    fn send(&mut self, mut to: Box<dyn Link>) -> io::Result<()> {
        let _watch = self.shared.stop.watch_failure(self.waker.clone());
        let mut way = OneWay::new(self.recording, self.number, Side::Source);
        let mut buffer = vec![0; BUFFER];
        while let Some(head) = way.next_record().map_err(io::Error::other)? {
            self.wait_until(head.at)?;
            while way.left() > 0 {
                let count = way.read(&mut buffer)?;
                if count == 0 {
                    return Err(io::Error::other("the recording has become shorter"));
                }
                send_all(&mut *to, buffer.get(..count).unwrap_or_default())?;
                self.shared.lock().sent += count as u64;
            }
        }
        // A source closes its connections after SHUT, and its channels together with main.
        self.wait_for_replies();
        if let Err(error) = to.close_send() {
            tracing::debug!(%error, "cannot close a connection");
        }
        Ok(())
    }

    /// Waits until this time of the recording.
    fn wait_until(&self, at: Duration) -> io::Result<()> {
        if self.fast {
            return Ok(());
        }
        self.shared.stop.pause(at.saturating_sub(self.start.elapsed())).map_err(io::Error::other)
    }

    /// Waits until the destination has replied as much as in the recording, or its replies have ended.
    fn wait_for_replies(&self) {
        let mut state = self.shared.lock();
        let begun = Instant::now();
        while state.awaited > 0 && !self.shared.stop.is_stopped() {
            let left = REPLIES.saturating_sub(begun.elapsed());
            if left.is_zero() {
                tracing::debug!(
                    awaited = state.awaited,
                    "the destination replies less than in the recording"
                );
                return;
            }
            // A stop shuts the connections down, which ends the replies.
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reads the replies of the destination until it closes the connection.
    fn receive(&self, mut from: Box<dyn Link>, expected: u64) -> io::Result<()> {
        let (mut left, mut buffer) = (expected, vec![0; 1 << 12]);
        let mut tail: Vec<u8> = Vec::new();
        let ended = loop {
            match from.recv(&mut [PartMut::from(&mut *buffer)]) {
                Ok(0) => break Ok(()),
                Ok(count) => {
                    let taken = left.min(count as u64);
                    left -= taken;
                    tail.extend_from_slice(buffer.get(..count).unwrap_or_default());
                    tail.drain(..tail.len().saturating_sub(SHUT));
                    self.shared.lock().awaited -= taken;
                    self.shared.changed.notify_all();
                }
                Err(error) => break Err(error),
            }
        };
        let mut state = self.shared.lock();
        state.awaited -= left;
        // Nothing follows SHUT.
        if let Ok(Some(Message::Shut(code))) =
            Message::decode(&mut Reader::new(&tail[..], StreamKind::ReturnPath))
            && code != 0
        {
            state.error.get_or_insert(format!("it reported failure (code {code}); its log has the reason"));
        }
        drop(state);
        self.shared.changed.notify_all();
        // A destination that has all of a channel may close it in any way.
        ended.or_else(|error| if left == 0 { Ok(()) } else { Err(error) })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const ENCRYPTED: &str = "it is the recording of an encrypted migration (TLS), and a destination accepts the bytes of a TLS session only \
                         once: multifd inspect shows what passed; to replay a migration, record it without TLS";
/// The length of SHUT.
const SHUT: usize = 8;
const BUFFER: usize = 256 << 10;
/// How long a destination may accept nothing.
const STALL: Duration = Duration::from_secs(60);
/// How long the end waits for replies.
const REPLIES: Duration = Duration::from_secs(30);
