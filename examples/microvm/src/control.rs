//! The control socket of a running machine: a line in, a line out.
//!
//! ```text
//! status                                         verify                    quit
//! snapshot PATH                                  snapshot-moment PATH
//! migrate ADDRESS OPTION=VALUE …                 hand-over ADDRESS
//! ```
//!
//! A client that disconnects while a migration runs cancels it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    str::FromStr,
    thread,
    time::Duration,
};

use multifd::{
    channel::{Address, Stop},
    live::{MigrateOptions, MigrationInfo, PostcopyWhen, ZeroPageDetection},
};
use qemu_stream::{format::Configuration, source::SourceOptions};

use crate::{Failure, early, local, machine::Machine, snapshot, source};

/// Serves one client after the other, until the machine has migrated or gets the command to quit.
pub(crate) fn serve(machine: &Machine, listener: &UnixListener) -> Result<(), Failure> {
    loop {
        let (client, _) = listener.accept()?;
        let mut line = String::new();
        if BufReader::new(&client).read_line(&mut line).is_err() {
            continue;
        }
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (answer, goes_on) = match words[..] {
            ["status"] => (status(machine), true),
            ["verify"] => (machine.verify().map(|(wrong, all)| format!("wrong={wrong} of={all}")), true),
            ["quit"] => (Ok(String::new()), false),
            // A path may contain spaces.
            ["snapshot", ..] => (snapshot(machine, line.trim_end().split_once(' ')), true),
            // Two paths, separated by a tab.
            ["snapshot-since", ..] => (snapshot_since(machine, line.trim_end().split_once(' ')), true),
            ["snapshot-moment", ..] => (snapshot_moment(machine, line.trim_end().split_once(' ')), true),
            ["migrate", address, ..] => match migrate(machine, address, &line, &client) {
                Ok(report) => (Ok(report), false),
                Err(error) => (Err(error), true),
            },
            ["hand-over", address] => match hand_over(machine, address, &client) {
                Ok(report) => (Ok(report), false),
                Err(error) => (Err(error), true),
            },
            _ => (Err(format!("unknown request {line:?}").into()), true),
        };
        let answer =
            answer.map_or_else(|error| format!("error: {}", chain(&*error)), |text| format!("ok {text}"));
        // If the client has disconnected, it does not need the answer.
        let _ = writeln!(&client, "{answer}");
        if !goes_on {
            return Ok(());
        }
    }
}

fn status(machine: &Machine) -> Result<String, Failure> {
    let health = machine.health();
    match health.wrong {
        Some(wrong) => Err(wrong.into()),
        None => {
            Ok(format!("batches={} ran_at={} stopped_at={}", health.batches, health.times.0, health.times.1))
        }
    }
}

fn snapshot(machine: &Machine, line: Option<(&str, &str)>) -> Result<String, Failure> {
    let (_, path) = line.ok_or("expected a path")?;
    captured(machine, &snapshot::save(machine, Path::new(path), None)?)
}

fn snapshot_since(machine: &Machine, line: Option<(&str, &str)>) -> Result<String, Failure> {
    let paths = line.and_then(|(_, paths)| paths.split_once('\t'));
    let (base, path) = paths.ok_or("expected the path of the base, a tab, and a path")?;
    captured(machine, &snapshot::save(machine, Path::new(path), Some(Path::new(base)))?)
}

fn captured(machine: &Machine, info: &MigrationInfo) -> Result<String, Failure> {
    Ok(format!("pages={} batches={}", info.ram.normal, machine.health().batches))
}

fn snapshot_moment(machine: &Machine, line: Option<(&str, &str)>) -> Result<String, Failure> {
    let (_, path) = line.ok_or("expected a path")?;
    let (stats, pause) = snapshot::save_moment(machine, Path::new(path))?;
    Ok(format!(
        "pages={} batches={} pause_us={} hold_us={} held={} noted={} first={} faults={} p99_us={}",
        stats.stored,
        machine.health().batches,
        pause.as_micros(),
        stats.hold.as_micros(),
        stats.held,
        stats.noted,
        stats.first,
        stats.faults,
        stats.p99.unwrap_or_default().as_micros(),
    ))
}

fn migrate(machine: &Machine, address: &str, line: &str, client: &UnixStream) -> Result<String, Failure> {
    let when = value(line, "postcopy")?;
    let passes = MigrateOptions::new()
        .downtime_limit(Duration::from_millis(value(line, "downtime_ms")?))
        .max_bandwidth(Some(value(line, "bandwidth")?))
        .auto_converge(value(line, "auto_converge")?)
        .max_passes(Some(value(line, "max_passes")?))
        .postcopy(when)
        .zero_page_detection(ZeroPageDetection::Multifd);
    let configuration = Configuration::new(Machine::machine_type()?);
    let options = SourceOptions::new(configuration)
        .channels(value(line, "channels")?)
        .migrate(passes)
        .channels_may_break(value(line, "channels_may_break")?)
        .stall_timeout(Some(Duration::from_millis(value(line, "stall_ms")?)));
    let address: Address = address.parse()?;
    if when == PostcopyWhen::Never {
        let info = until_disconnected(client, |stop| source::migrate(machine, address, options, stop))?;
        return Ok(report(machine, &info));
    }
    let (info, postcopy) =
        until_disconnected(client, |stop| early::migrate(machine, address, options, stop))?;
    let report = report(machine, &info);
    Ok(match postcopy {
        None => report,
        Some(postcopy) => format!(
            "{report} switched=1 requests={} later_pages={} later_ms={} recoveries={} over_channels={}",
            postcopy.requests,
            postcopy.normal + postcopy.zero,
            postcopy.total_time.as_millis(),
            postcopy.recoveries,
            u8::from(postcopy.over_channels),
        ),
    })
}

fn hand_over(machine: &Machine, address: &str, client: &UnixStream) -> Result<String, Failure> {
    let address: Address = address.parse()?;
    let info = until_disconnected(client, |stop| local::hand_over(machine, &address, stop))?;
    Ok(report(machine, &info))
}

/// A client that disconnects meanwhile stops what it has asked for.
fn until_disconnected<T>(client: &UnixStream, work: impl FnOnce(&Stop) -> T) -> T {
    let stop = Stop::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Ends when the client disconnects, or with the shutdown below.
            let _ = (&*client).read(&mut [0]);
            stop.cancel();
        });
        let done = work(&stop);
        let _ = client.shutdown(Shutdown::Read);
        done
    })
}

fn report(machine: &Machine, info: &MigrationInfo) -> String {
    let (ram, health) = (&info.ram, machine.health());
    let lost: Vec<_> = info.lost_channels.iter().map(ToString::to_string).collect();
    let lost = if lost.is_empty() { String::new() } else { format!(" lost_channels={}", lost.join(",")) };
    format!(
        "passes={} downtime_ms={} total_ms={} transferred={} pages={} zero={} mbps={:.0} throttled={} batches={} stopped_at={}{lost}",
        // The bits are taken before the first pass as well.
        ram.dirty_sync_count.saturating_sub(1),
        info.downtime.unwrap_or_default().as_millis(),
        info.total_time.as_millis(),
        ram.transferred,
        ram.normal,
        ram.duplicate,
        ram.mbps,
        info.cpu_throttle_percentage.unwrap_or_default(),
        health.batches,
        health.times.1,
    )
}

/// Sends a line to the machine at `socket`, and returns its answer.
pub(crate) fn ask(socket: &Path, line: &str) -> Result<String, Failure> {
    let stream = UnixStream::connect(socket).map_err(|error| format!("{}: {error}", socket.display()))?;
    writeln!(&stream, "{line}")?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    match answer.trim_end().strip_prefix("ok") {
        Some(answer) => Ok(answer.trim_start().to_owned()),
        None if answer.is_empty() => Err("the process of the machine has ended".into()),
        None => Err(answer.trim_end().into()),
    }
}

/// The number after a name in an answer.
pub(crate) fn number(answer: &str, name: &str) -> Result<u128, Failure> {
    value(answer, name)
}

/// The value after a name in a line.
pub(crate) fn value<T: FromStr<Err: Into<Failure>>>(line: &str, name: &str) -> Result<T, Failure> {
    let value = line.split_ascii_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    value.ok_or_else(|| format!("no {name} in {line:?}"))?.parse().map_err(Into::into)
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    multifd::error::chain(error).to_string().replace('\n', " ")
}
