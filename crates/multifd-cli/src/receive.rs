//! `multifd receive`: a running QEMU guest comes in and is kept as a file.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use multifd::{
    ChannelStats, Error, ReceiveOptions, Receiver, RecvCounters,
    channel::{Listener, Stop, Stream},
    error::Usage,
    ram::{BlockName, RamBlocks},
};
use qemu_stream::incoming::{Expected, Incoming, LeftOut, Loaded, Loader, MainPages, Outcome};

use crate::{
    args::{MissingPagesArg, ReceiveArgs, ReceiveTlsArgs},
    capture::{Capture, Channels},
    combinations,
    direct_io::DirectIo,
    display::{Display, Look},
    interrupt,
    outcome::{Failure, While, print, say},
    report::{Channel, Ram, Report, millis},
};

/// What has come in, beside RAM's bytes.
struct Received {
    loaded: Loaded,
    blocks: Arc<RamBlocks>,
    /// Shared blocks, whose memory has not come.
    ignored: Vec<BlockName>,
    channels: Vec<ChannelStats>,
    main_bytes: u64,
    main_pages: MainPages,
    /// Why the source, which waits for it, was not told that the machine is kept.
    untold: Option<Error>,
}

pub(crate) fn run(args: &ReceiveArgs) -> Result<(), Failure> {
    combinations::of_receive(args)?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let credentials = args.tls.credentials()?;
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let capture = Capture::create(&args.file, args.force, &direct_io)?;
    let listener = Listener::bind(&args.listen)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    let address = listener.local_address().clone();
    let listener = ReceiveTlsArgs::listener(credentials, listener);
    let options = ReceiveOptions::new()
        .channels(args.multifd_channels)
        .channels_from(args.channels_from.clone())
        .method(args.multifd_compression.0)
        .stall_timeout(args.stall_timeout());
    let mut receiver = Receiver::new(options, stop.clone());
    receiver.listen(listener).map_err(Failure::of)?;
    say(&format!("listening on {address}"));
    let listening = Instant::now();
    let main = receiver.wait_main().map_err(|error| failed(args, None, listening, error))?;
    let start = Instant::now();
    let total = Arc::new(AtomicU64::new(0));
    let display = {
        let (counters, total) = (receiver.counters(), total.clone());
        Display::start("receive", args.output.quiet || args.output.json, move || look(&counters, &total))
    };
    let peer = main.peer();
    let incoming = Incoming::new(main)
        .switchover_ack(args.switchover_ack)
        .suppress_vmdesc(args.suppress_vmdesc)
        .stall_timeout(args.stall_timeout());
    let left_out = match args.missing_pages {
        // With x-ignore-shared the file does without the blocks of which no page has come.
        MissingPagesArg::Refuse => LeftOut::SharedBlocks,
        MissingPagesArg::Zero => LeftOut::Pages,
    };
    let received = take_in(receiver, incoming, capture, &total, left_out);
    drop(display);
    match received {
        Ok(received) => {
            if received.main_pages.normal > 0 {
                direct_io.without_channels();
            }
            let report = report(&received, start);
            if args.output.json {
                print(&report.json())?;
            } else if !args.output.quiet {
                say(&report.text(&format!("received {}", args.file)));
                ignored(&received);
            }
            match received.untold {
                None => Ok(()),
                Some(error) => {
                    let told = format!("{} is complete, but {UNTOLD}", args.file);
                    Err(Failure::SourceNotTold(While::new(told, error).into()))
                }
            }
        }
        Err(error) => Err(failed(args, Some(&peer), start, error)),
    }
}

/// Says what the file lacks: it is worth nothing without.
fn ignored(received: &Received) {
    for name in &received.ignored {
        say(&format!(
            "block {name:?} is shared and stays where it is: the file is good for as long as nobody changes that memory"
        ));
    }
}

/// The end of a migration that failed, told as it was asked for.
fn failed(args: &ReceiveArgs, peer: Option<&str>, start: Instant, error: Error) -> Failure {
    if args.output.json {
        let report = Report { total_time: millis(start.elapsed()), ..Report::default() };
        if let Err(full) = print(&report.failed(&error).json()) {
            tracing::error!(error = %full, "the report is lost");
        }
    }
    if error.is_cancelled() {
        return Failure::Interrupted;
    }
    let from = peer.map_or_else(String::new, |peer| format!(" from {peer}"));
    While::new(format!("the migration{from} into {} failed", args.file), error).into()
}

/// Reads the whole migration, keeps it, and tells the source how that went.
fn take_in(
    receiver: Receiver,
    mut incoming: Incoming<Stream>,
    capture: Capture,
    total: &AtomicU64,
    left_out: LeftOut,
) -> Result<Received, Error> {
    let stop = receiver.stop().clone();
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |configuration, list| {
        total.store(list.total(), Ordering::Relaxed);
        capture.blocks(configuration, list)
    })
    .left_out(left_out);
    let loaded = incoming.run(&mut loader);
    let main_pages = loader.main_pages();
    let whole = loaded.map_err(broken).and_then(|loaded| {
        let blocks = loader.finish(&loaded)?;
        Ok((loaded, blocks))
    });
    let kept = whole.and_then(|(loaded, blocks)| {
        let arrived = receiver.arrived().ok_or(Usage::TooEarly("the block list"))?;
        stop.check()?;
        if !loaded.return_path {
            // The source has gone its way, and what there is to know of it can be known now.
            let ended = incoming.connection().finish();
            ended.map_err(|error| Error::io("take leave of the source", error))?;
        }
        let channels = Channels { any: !receiver.counters().stats().is_empty(), uuid: receiver.uuid() };
        let kept = capture.complete(&loaded, arrived, &channels, &stop);
        let ignored =
            kept.map_err(|error| Error::other("the machine has come, but cannot be kept", error))?;
        Ok((loaded, blocks, ignored))
    });
    match kept {
        Ok((loaded, blocks, ignored)) => {
            let main_bytes = incoming.bytes();
            // The file has its name by now, and stays whatever happens from here on: it may be the only copy.
            let told =
                incoming.finish(Outcome::Loaded).map_err(|error| Error::other("tell the source", error));
            // Taking leave of the channels cannot fail the migration any more.
            let counters = receiver.counters();
            let channels = receiver.finish().unwrap_or_else(|error| {
                tracing::debug!(%error, "an error after completion");
                counters.stats()
            });
            let heard = told.and_then(|main| if loaded.return_path { heard(main) } else { Ok(()) });
            let untold = heard.err();
            Ok(Received { loaded, blocks, ignored, channels, main_bytes, main_pages, untold })
        }
        Err(error) => {
            // It is told before anything is shut down, unless a channel's failure has done that; then it finds out.
            if let Err(untold) = incoming.finish(Outcome::Failed) {
                tracing::debug!(%untold, "the source could not be told");
            }
            Err(stop.fail(error))
        }
    }
}

/// Waits until a source that has been told closes the connection: one that has gone before breaks it.
fn heard(mut main: Stream) -> Result<(), Error> {
    let read = main.set_read_timeout(Some(TAKES_LEAVE)).and_then(|()| main.read(&mut [0]));
    match read {
        // It has closed in order, or leaves the connection open.
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => Ok(()),
        Err(error) => Err(Error::io("wait for the source to close", error)),
    }
}

const UNTOLD: &str = "the source was not told so (it was cancelled, or its process ended) and may be running the guest: make \
                      sure that only one of the two goes on";
/// How long a source may take to close when it has been told.
const TAKES_LEAVE: Duration = Duration::from_secs(5);

fn broken(error: qemu_stream::Error) -> Error {
    Error::other("the migration broke off", error)
}

fn look(counters: &RecvCounters, total: &AtomicU64) -> Look {
    let channels = counters.stats();
    let transferred = channels.iter().map(|channel| channel.bytes).sum();
    Look {
        done: 0,
        total: 0,
        transferred,
        pass: counters.sync_points(),
        to_go: None,
        note: format!(
            "{} received, the guest has {}",
            indicatif::BinaryBytes(transferred),
            indicatif::BinaryBytes(total.load(Ordering::Relaxed))
        ),
    }
}

fn report(received: &Received, start: Instant) -> Report {
    let Received { loaded, blocks, channels, main_bytes, main_pages, untold, .. } = received;
    let time = start.elapsed();
    let page_size = blocks.page_size().bytes() as u64;
    let multifd_bytes: u64 = channels.iter().map(|channel| channel.bytes).sum();
    let normal = channels.iter().map(|channel| channel.normal).sum::<u64>() + main_pages.normal;
    let zero = channels.iter().map(|channel| channel.zero).sum::<u64>() + main_pages.zero;
    let seconds = time.as_secs_f64().max(1e-9);
    let transferred = multifd_bytes + main_bytes;
    Report {
        status: "completed",
        source_told: loaded.return_path.then_some(untold.is_none()),
        total_time: millis(time),
        ram: Ram {
            total: loaded.blocks.total(),
            transferred,
            duplicate: zero,
            normal,
            normal_bytes: normal * page_size,
            page_size,
            mbps: transferred as f64 * 8.0 / 1e6 / seconds,
            pages_per_second: crate::report::rate(normal + zero, time),
            multifd_bytes,
            precopy_bytes: *main_bytes,
            ..Ram::default()
        },
        channels: channels.iter().map(Channel::from).collect(),
        ..Report::default()
    }
}
