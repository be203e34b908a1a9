//! `multifd receive`: receives a running QEMU guest and stores it in a file.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use multifd::{
    ChannelStats, Error, Fault, ReceiveOptions, RecvCounters,
    channel::{Listener, Stop},
    ram::BlockName,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions},
    incoming::{Expected, LeftOut, MainPages},
};

use super::tls;
use crate::{
    args::{MissingPagesArg, ReceiveArgs},
    capture::{Capture, Channels},
    combinations,
    direct_io::DirectIo,
    interrupt,
    listen_address::ListenAddress,
    output::{
        display::Display,
        outcome::{Failure, While, print, say},
        progress::Look,
        report::{Channel, Ram, Report, millis},
    },
};

/// The report about a received guest.
struct Received {
    /// Bytes of RAM.
    total: u64,
    page_size: u64,
    return_path: bool,
    /// Shared blocks, whose memory was not sent.
    ignored: Vec<BlockName>,
    channels: Vec<ChannelStats>,
    main_bytes: u64,
    main_pages: MainPages,
    /// Why the source, which waits for it, did not get the confirmation.
    untold: Option<Error>,
}

pub(crate) fn run(args: &ReceiveArgs) -> Result<(), Failure> {
    let listen = args.listen.open()?;
    combinations::of_receive(args, &listen.address)?;
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    interrupt::spares_large_files();
    let credentials = tls::credentials(args)?;
    let direct_io = DirectIo { wanted: args.direct_io, quiet: args.output.quiet, address: &args.file };
    let capture = Capture::create(&args.file, args.force, &direct_io)?;
    let listener = Listener::bind(&listen.address)
        .map_err(|error| While::new(format!("cannot listen at {}", args.listen), error))?;
    let address = match &args.listen {
        ListenAddress::Address(_) => listener.local_address().to_string(),
        ListenAddress::StandardInput => args.listen.to_string(),
    };
    let listener = tls::listen(credentials, listener);
    let receive = ReceiveOptions::new()
        .channels(args.multifd_channels)
        .channels_from(args.channels_from.clone())
        .method(args.multifd_compression.0)
        .decompression_memory(args.decompression_memory());
    let options = ArrivalOptions::new(Expected::AnyMachine)
        .receive(receive)
        .left_out(match args.missing_pages {
            // With x-ignore-shared, the file omits the blocks of which no page has arrived.
            MissingPagesArg::Refuse => LeftOut::SharedBlocks,
            MissingPagesArg::Zero => LeftOut::Pages,
        })
        .stall_timeout(args.stall_timeout())
        .switchover_ack(args.switchover_ack)
        .suppress_vmdesc(args.suppress_vmdesc);
    let listening = Arrival::listen(listener, options, &stop).map_err(Failure::of)?;
    say(&format!("listening on {address}"));
    if !args.output.quiet {
        args.listen.note_unread_pipe();
    }
    let start = Instant::now();
    let arrival = listening.accept().map_err(|error| failed(args, None, start, error))?;
    let start = Instant::now();
    let total = Arc::new(AtomicU64::new(0));
    let display = {
        let (counters, total) = (arrival.counters(), total.clone());
        Display::start("receive", args.output.quiet || args.output.json, move || look(&counters, &total))
    };
    let peer = arrival.peer().to_owned();
    let received = take_in(arrival, capture, &total, &stop);
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

/// Prints what the file lacks, because it is useless without.
fn ignored(received: &Received) {
    for name in &received.ignored {
        say(&format!(
            "WARNING: block {name:?} is shared memory and is not in the file: the file can only be restored while that memory \
             is unchanged"
        ));
    }
}

/// Reports a migration that failed, in the requested form.
fn failed(args: &ReceiveArgs, peer: Option<&str>, start: Instant, error: Error) -> Failure {
    if args.output.json {
        let report = Report { total_time: millis(start.elapsed()), ..Report::default() };
        if let Err(full) = print(&report.failed(&error).json()) {
            tracing::error!(error = %full, "cannot print the report");
        }
    }
    if error.is_cancelled() {
        return Failure::Interrupted;
    }
    let from = peer.map_or_else(String::new, |peer| format!(" from {peer}"));
    let what = format!("the migration{from} into {} failed{}", args.file, likely(&error));
    While::new(what, error).into()
}

/// The likely cause at the other end, printed before the details of the stream.
fn likely(error: &Error) -> &'static str {
    match error.fault() {
        Fault::Connection => ": the connection to the source ended early",
        Fault::Stalled => ": the source sends no data",
        Fault::Protocol => ": the stream from the source is invalid, incomplete or not supported",
        _ => "",
    }
}

/// Receives the whole migration, stores it, and informs the source.
fn take_in(arrival: Arrival, capture: Capture, total: &AtomicU64, stop: &Stop) -> Result<Received, Error> {
    let mut pending = arrival.load(|configuration, list| {
        total.store(list.total(), Ordering::Relaxed);
        capture.blocks(configuration, list)
    })?;
    let kept = stop.check().and_then(|()| pending.check_source()).and_then(|()| {
        let channels = Channels { any: !pending.channels().is_empty(), uuid: pending.uuid() };
        let kept = capture.complete(pending.loaded(), pending.arrived(), &channels, stop);
        kept.map_err(|error| Error::other("all data was received, but the file cannot be completed", error))
    });
    let ignored = match kept {
        Ok(ignored) => ignored,
        Err(error) => return Err(pending.refuse(error)),
    };
    // The file has its name by now and stays on every path from here on: it may be the only copy.
    let mut received = Received {
        total: pending.loaded().blocks.total(),
        page_size: pending.blocks().page_size().bytes() as u64,
        return_path: pending.loaded().return_path,
        ignored,
        channels: pending.channels(),
        main_bytes: pending.main_bytes(),
        main_pages: pending.main_pages(),
        untold: None,
    };
    match pending.confirm() {
        Ok(mut confirmed) => {
            received.untold = confirmed.wait_closed(SOURCE_CLOSES).err();
            received.channels = confirmed.finish();
        }
        Err(error) => received.untold = Some(error),
    }
    Ok(received)
}

const UNTOLD: &str = "the source did not get the confirmation (it was cancelled, or its process ended) and may still run the \
                      guest: check the source before you restore the file, the guest must not run twice";
/// The time limit for a source to close main after the confirmation.
const SOURCE_CLOSES: Duration = Duration::from_secs(5);

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
    let Received { total, page_size, return_path, channels, main_bytes, main_pages, untold, .. } = received;
    let time = start.elapsed();
    let multifd_bytes: u64 = channels.iter().map(|channel| channel.bytes).sum();
    let normal = channels.iter().map(|channel| channel.normal).sum::<u64>() + main_pages.normal;
    let zero = channels.iter().map(|channel| channel.zero).sum::<u64>() + main_pages.zero;
    let seconds = time.as_secs_f64().max(1e-9);
    let transferred = multifd_bytes + main_bytes;
    Report {
        status: "completed",
        source_told: return_path.then_some(untold.is_none()),
        total_time: millis(time),
        ram: Ram {
            total: *total,
            transferred,
            duplicate: zero,
            normal,
            normal_bytes: normal * page_size,
            page_size: *page_size,
            mbps: transferred as f64 * 8.0 / 1e6 / seconds,
            pages_per_second: crate::output::report::rate(normal + zero, time),
            multifd_bytes,
            precopy_bytes: *main_bytes,
            ..Ram::default()
        },
        channels: channels.iter().map(Channel::from).collect(),
        ..Report::default()
    }
}
