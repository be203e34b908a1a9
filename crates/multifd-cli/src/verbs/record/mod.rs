//! `multifd record`: passes a migration on between two QEMUs, and writes what passes to a file.
//!
//! ```text
//! source ══▶ rec_N_there ══▶ destination       full buffers ─▶ record_writer ─▶ OUT
//! source ◀══ rec_N_back  ◀══ destination       empty buffers ◀─     (store.rs)
//!              (pass.rs)
//! ```
//!
//! This thread accepts connections, and connects each to the target before it accepts the next one: a destination may identify them by
//! their order.

mod live;
mod pass;
mod store;

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use indicatif::BinaryBytes;
use multifd::channel::{Connect, Context, Link, Listen, Listener, Stop};
use qemu_stream::recording::{ConnectionNumber, FileHead, RecordKind, Side};
use serde::Serialize;

pub(super) use self::pass::send_all;
use self::{live::Live, pass::Pass, store::Store};
use crate::{
    args::RecordArgs,
    interrupt,
    output::{
        outcome::{Failure, While},
        outlet::{print_json, say, shown},
    },
    service,
};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Summary {
    connections: u16,
    source_bytes: u64,
    destination_bytes: u64,
    file_bytes: u64,
    /// Milliseconds.
    total_time: u64,
    /// Milliseconds in which connections waited for the disk, of all of them.
    held: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    given_up: Option<String>,
}

pub(crate) fn run(args: &RecordArgs) -> Result<(), Failure> {
    interrupt::spares_large_files();
    let (stop, start) = (Stop::new(), Instant::now());
    args.target.check_connect().map_err(|error| Failure::Usage(error.into()))?;
    let file = create(&args.out, args.force)
        .map_err(|error| While::new(format!("cannot create {}", shown(&args.out)), error))?;
    let mut listener = Listener::bind(&args.listen)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    if listener.is_single() || args.target.is_single() {
        let why = "it is one connection, and a migration has several: use tcp:, unix: or vsock:";
        let which = if listener.is_single() { &args.listen } else { &args.target };
        return Err(Failure::Usage(While::new(format!("cannot record at {which}"), why).into()));
    }
    let head = FileHead { started: SystemTime::now() };
    let store = Store::start(file, head, start)?;
    let live = Arc::new(Live::new(Listen::waker(&listener)));
    let (by_signal, alive) = (store.clone(), live.clone());
    interrupt::counts(move |count| {
        if count > 1 {
            std::process::exit(130);
        }
        by_signal.give_up(INTERRUPTED);
        let open = alive.interrupt();
        if open > 0 {
            say(&format!(
                "the recording ends here; the migration continues over {open} connections. WARNING: a second interrupt ends it"
            ));
        }
    })?;
    say(&format!("listening on {}", listener.local_address()));
    service::ready();

    let context = Context::new(&stop).stall_timeout(None);
    let mut recorder =
        Recorder { args, store: store.clone(), live, context, threads: Vec::new(), number: 0, refused: None };
    let accepted = recorder.accept(&mut listener);
    // Nobody else can connect while the last bytes are written.
    drop(listener);
    for thread in recorder.threads.drain(..) {
        if thread.join().is_err() {
            return Err("a thread of a connection has panicked".into());
        }
    }
    let (number, refused) = (recorder.number, recorder.refused.take());
    let totals = store.finish();
    let summary = Summary {
        connections: number,
        source_bytes: totals.bytes[0],
        destination_bytes: totals.bytes[1],
        file_bytes: totals.written,
        total_time: millis(start.elapsed()),
        held: millis(totals.held),
        given_up: totals.given_up.clone(),
    };
    report(args, &summary)?;
    accepted?;
    match totals.given_up {
        Some(why) if why == INTERRUPTED => Err(Failure::Interrupted),
        Some(why) => {
            let text = format!("{} ends before the migration", shown(&args.out));
            Err(While::new(text, why).into())
        }
        None => refused.map_or(Ok(()), |error| Err(error.into())),
    }
}

fn report(args: &RecordArgs, summary: &Summary) -> Result<(), Failure> {
    if args.json {
        print_json(summary)?;
    } else if !args.quiet {
        say(&format!(
            "recorded {} connections: {} from the source, {} from the destination, in {:.3} s",
            summary.connections,
            BinaryBytes(summary.source_bytes),
            BinaryBytes(summary.destination_bytes),
            Duration::from_millis(summary.total_time).as_secs_f64(),
        ));
        if summary.held > 0 {
            say(&format!(
                "note: connections waited {} ms for the disk of {}, all of them together",
                summary.held,
                shown(&args.out)
            ));
        }
    }
    Ok(())
}

struct Recorder<'a> {
    args: &'a RecordArgs,
    store: Arc<Store>,
    live: Arc<Live>,
    context: Context,
    threads: Vec<JoinHandle<()>>,
    /// The number of the next connection.
    number: u16,
    /// The first connection that could not be passed on.
    refused: Option<While>,
}

impl Recorder<'_> {
    /// Accepts connections until all are closed.
    fn accept(&mut self, listener: &mut Listener) -> Result<(), Failure> {
        while !self.live.has_ended() {
            let accepted = listener.accept(&self.context).map_err(|error| {
                While::new(format!("cannot accept a connection at {}", self.args.listen), error)
            });
            let link = match accepted {
                Ok(Some(link)) => link,
                Ok(None) => continue,
                // The connections that are open go on.
                Err(error) => {
                    self.live.no_more();
                    return Err(error.into());
                }
            };
            let peer = link.peer();
            if let Err(error) = self.open(link) {
                let failed = While::new(
                    format!("cannot pass on the connection from {peer} to {}", self.args.target),
                    error,
                );
                say(&format!("warning: {}", multifd::error::chain(&failed)));
                self.refused.get_or_insert(failed);
                self.live.failed();
            }
        }
        Ok(())
    }

    /// Connects the connection of a source to the target, and starts its threads.
    fn open(&mut self, source: Box<dyn Link>) -> io::Result<()> {
        let number = ConnectionNumber::new(self.number)
            .filter(|_| self.live.open() < MOST)
            .ok_or_else(|| io::Error::other(format!("there are already {MOST} connections")))?;
        let destination = self.args.target.connect(&self.context)?;
        self.number += 1;
        self.store.note(RecordKind::Opened, Side::Source, number, &source.peer());
        let wakers = [source.waker(), destination.waker()];
        let (from_source, to_source) = source.split()?;
        let (from_destination, to_destination) = destination.split()?;
        let pair = [
            ("there", Side::Source, from_source, to_destination),
            ("back", Side::Destination, from_destination, to_source),
        ];
        for (name, side, from, to) in pair {
            // It counts from here on, also if its thread cannot be started: its guard is dropped then.
            let life = self.live.begin();
            let pass =
                Pass { from, to, side, number, store: self.store.clone(), wakers: wakers.clone(), life };
            let thread = std::thread::Builder::new()
                .name(format!("rec_{}_{name}", number.number()))
                .spawn(move || pass.run())
                .inspect_err(|_| wakers.iter().for_each(|waker| waker.wake()))?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

/// Creates the file under its name: it must be there if this process is killed.
fn create(path: &Path, force: bool) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    if !force {
        return options.create_new(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => io::Error::new(error.kind(), "it exists; --force replaces it"),
            _ => error,
        });
    }
    let file = options.create(true).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a regular file"));
    }
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    file.set_len(0)?;
    Ok(file)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The greatest number of directions that are open at once: of all channels, main and some others.
const MOST: usize = 2 * 320;
const INTERRUPTED: &str = "it was interrupted";
