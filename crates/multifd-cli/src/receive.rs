//! `multifd receive`: a running QEMU guest comes in and is kept as a file.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use multifd::{
    ChannelStats, Error, ReceiveOptions, Receiver, RecvCounters,
    channel::{Listener, Stop, Stream},
    ram::RamBlocks,
};
use qemu_stream::incoming::{Incoming, Loaded, Loader, MainPages, Outcome};

use crate::{
    args::ReceiveArgs,
    capture::Capture,
    display::{Display, Look},
    interrupt,
    outcome::{Failure, While, print, say},
    report::{Channel, Ram, Report, millis},
};

/// What has come in, beside RAM's bytes.
struct Received {
    loaded: Loaded,
    blocks: Arc<RamBlocks>,
    channels: Vec<ChannelStats>,
    main_bytes: u64,
    main_pages: MainPages,
}

pub(crate) fn run(args: &ReceiveArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let capture = Capture::create(&args.file, args.force)?;
    let listener = Listener::bind(&args.listen)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    say(&format!("listening on {}", listener.local_address()));
    let mut receiver = Receiver::new(ReceiveOptions::new().channels(args.multifd_channels), stop.clone());
    receiver.listen(Box::new(listener)).map_err(Failure::of)?;
    let main = receiver.wait_main().map_err(Failure::of)?;
    let start = Instant::now();
    let total = Arc::new(AtomicU64::new(0));
    let display = {
        let (counters, total) = (receiver.counters(), total.clone());
        Display::start("receive", args.output.quiet || args.output.json, move || look(&counters, &total))
    };
    let received = take_in(receiver, main, capture, &total);
    drop(display);
    match received {
        Ok(received) => {
            let report = report(&received, start);
            if args.output.json {
                print(&report.json())?;
            } else if !args.output.quiet {
                say(&report.text(&format!("received {}", args.file.display())));
            }
            Ok(())
        }
        Err(error) => {
            if args.output.json {
                let status = if error.is_cancelled() { "cancelled" } else { "failed" };
                let report = Report { total_time: millis(start.elapsed()), ..Report::default() };
                print(&report.failed(status, &error).json())?;
            }
            Err(Failure::of(error))
        }
    }
}

/// Reads the whole migration, keeps it, and tells the source how that went.
fn take_in(receiver: Receiver, main: Stream, capture: Capture, total: &AtomicU64) -> Result<Received, Error> {
    let stop = receiver.stop().clone();
    let mut incoming = Incoming::new(main);
    let mut loader = Loader::new(&receiver, |configuration, list| {
        total.store(list.total(), Ordering::Relaxed);
        capture.blocks(configuration, list)
    });
    let loaded = incoming.run(&mut loader);
    let main_pages = loader.main_pages();
    let blocks = loader.into_blocks();
    let kept = loaded.map_err(|error| stop.fail(broken(error))).and_then(|loaded| {
        let blocks =
            blocks.ok_or_else(|| stop.fail(Error::other("no RAM came", "the stream has no blocks")))?;
        stop.check()?;
        let kept = capture.complete(&loaded, &blocks, receiver.uuid());
        kept.map_err(|error| stop.fail(Error::other("the machine has come, but cannot be kept", error)))?;
        Ok((loaded, blocks))
    });
    match kept {
        Ok((loaded, blocks)) => {
            let main_bytes = incoming.bytes();
            let told = incoming.finish(Outcome::Loaded);
            let main = told.map_err(|error| stop.fail(broken(error)))?;
            let channels = receiver.finish()?;
            drop(main);
            Ok(Received { loaded, blocks, channels, main_bytes, main_pages })
        }
        Err(error) => {
            // The source finds out either way: it is told if it can be, or its connections close.
            if let Err(untold) = incoming.finish(Outcome::Failed) {
                tracing::debug!(%untold, "the source could not be told");
            }
            Err(error)
        }
    }
}

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
        note: format!(
            "{} of {} RAM",
            indicatif::BinaryBytes(transferred),
            indicatif::BinaryBytes(total.load(Ordering::Relaxed))
        ),
    }
}

fn report(received: &Received, start: Instant) -> Report {
    let Received { loaded, blocks, channels, main_bytes, main_pages } = received;
    let time = start.elapsed();
    let page_size = blocks.page_size().bytes() as u64;
    let multifd_bytes: u64 = channels.iter().map(|channel| channel.bytes).sum();
    let normal = channels.iter().map(|channel| channel.normal).sum::<u64>() + main_pages.normal;
    let zero = channels.iter().map(|channel| channel.zero).sum::<u64>() + main_pages.zero;
    let seconds = time.as_secs_f64().max(1e-9);
    let transferred = multifd_bytes + main_bytes;
    Report {
        status: "completed",
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
