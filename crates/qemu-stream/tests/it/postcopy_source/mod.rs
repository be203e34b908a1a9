//! Destinations of post-copy that misbehave, over real sockets, and how a source of a file ends: with what error, on which side
//! the guest is, and in time. A correct destination finds every page once, byte for byte.

mod cancels;
mod destination;
mod machine;
mod order;
mod requests;
mod resumes;
mod rows;

use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use multifd::{
    channel::{Address, Stop},
    error::chain,
};
use qemu_stream::outgoing::postcopy::{GuestAt, PostcopyError, PostcopyOptions, PostcopySource};

use self::{
    destination::{Arrived, Destination, End, Listening, Plan},
    machine::{Machine, content},
};

/// How long a destination may be silent.
const LIMIT: Duration = Duration::from_secs(2);
/// No source takes longer than that.
const SOON: Duration = Duration::from_secs(60);

/// How a migration has ended.
struct Outcome {
    sent: Result<(), PostcopyError>,
    served: Result<(), End>,
    arrived: Vec<Arrived>,
    discarded: Vec<(String, u64, u64)>,
    took: Duration,
    source: PostcopySource,
}

impl Outcome {
    /// The text of the error, with its causes, and the side that has the guest.
    fn error(&self) -> (String, GuestAt) {
        let error = self.sent.as_ref().expect_err("it fails");
        (chain(&error.error).to_string(), error.guest)
    }
}

fn options() -> PostcopyOptions {
    PostcopyOptions::new().connect_timeout(LIMIT).stall_timeout(Some(LIMIT)).end_timeout(Some(LIMIT))
}

/// Sends a machine to a destination with this plan.
fn migrate(machine: &Machine, options: PostcopyOptions, plan: Plan) -> Outcome {
    migrate_over(machine, options, plan, &Listening::tcp(), &Stop::new())
}

fn migrate_over(
    machine: &Machine,
    options: PostcopyOptions,
    plan: Plan,
    listening: &Listening,
    stop: &Stop,
) -> Outcome {
    let source = machine.source(options.preempt(plan.preempt));
    migrate_source(machine, source, plan, listening, stop)
}

fn migrate_source(
    machine: &Machine,
    source: PostcopySource,
    plan: Plan,
    listening: &Listening,
    stop: &Stop,
) -> Outcome {
    let resumes = plan.has.is_some();
    let address = listening.address().parse::<Address>().unwrap();
    let (hold, ended) = channel();
    thread::scope(|scope| {
        let serves = scope.spawn(|| {
            let mut destination = match Destination::accept(listening, machine.list().clone(), plan, ended) {
                Ok(destination) => destination,
                Err(end) => return (Err(end), Vec::new(), Vec::new()),
            };
            let served = destination.serve();
            let arrived = std::mem::take(&mut *destination.arrived.lock().unwrap());
            let discarded = destination.discarded.iter();
            let discarded = discarded.map(|(name, start, length)| (name.to_string(), *start, *length));
            (served, arrived, discarded.collect())
        });
        let (done, waits) = channel();
        let stop = stop.clone();
        // Not of the scope: a source that hangs fails the test instead of blocking it.
        thread::spawn(move || {
            let (begun, mut source) = (Instant::now(), source);
            let sent = if resumes { source.resume(&address, &stop) } else { source.start(&address, &stop) };
            let _ = done.send((sent, begun.elapsed(), source));
        });
        let (sent, took, source) = match waits.recv_timeout(SOON) {
            Ok(done) => done,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("the source hangs");
                std::process::abort();
            }
            Err(RecvTimeoutError::Disconnected) => panic!("the source has panicked"),
        };
        drop(hold);
        listening.poke();
        listening.poke();
        let (served, arrived, discarded) = serves.join().unwrap();
        Outcome { sent, served, arrived, discarded, took, source }
    })
}

/// Every page arrived once, with its contents.
#[track_caller]
fn assert_whole(machine: &Machine, arrived: &[Arrived]) {
    let pages = |length: u64| usize::try_from(length >> 12).unwrap();
    let mut found: Vec<Vec<u8>> =
        machine.list().entries().iter().map(|entry| vec![0; pages(entry.used_length)]).collect();
    for (_, block, page, bytes) in arrived {
        found[block.0][usize::try_from(*page).unwrap()] += 1;
        assert_eq!(*bytes, content(*block, *page), "block {} page {page:#x}", block.0);
    }
    for (block, counts) in found.iter().enumerate() {
        let wrong = counts.iter().position(|count| *count != 1);
        assert_eq!(wrong, None, "block {block}: a page that did not arrive once");
    }
}
