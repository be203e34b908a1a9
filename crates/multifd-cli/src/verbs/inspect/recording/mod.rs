//! `multifd inspect` of a recording: the time line, as text, as JSON, or as a picture.

mod names;
mod svg;

use std::{fs, path::Path};

use indicatif::{BinaryBytes, HumanCount};
use qemu_stream::recording::{ChannelLine, Connection, Ending, FileHead, Flow, Recording, Side, Timeline};
use serde_json::{Value, json};

use self::names::{ms, name};
use crate::{
    args::InspectArgs,
    file_address::open_regular,
    output::{
        outcome::{Failure, While},
        outlet::{print_json, print_lines, say, shown},
    },
    stored::Within,
};

/// Whether the file is a recording. Errors are reported when it is opened.
pub(super) fn is_one(args: &InspectArgs) -> bool {
    let mut head = [0; FileHead::LEN];
    let read = open_regular(args.file.path())
        .and_then(|file| std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, args.file.offset()));
    read.is_ok() && FileHead::is_begun_by(&head)
}

pub(super) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let unreadable = |error| args.file.unreadable(error);
    let file = Within::open(&args.file).map_err(|error| args.file.unreadable(error))?;
    let recording = Recording::open(file).map_err(unreadable)?;
    let found = Timeline::of(&recording).map_err(unreadable)?;
    if let Some(out) = &args.svg {
        return picture(&found, out, args.force);
    }
    if args.json {
        print_json(&json_of(&found))?;
    } else {
        print_lines(&lines(&found))?;
    }
    Ok(())
}

fn picture(found: &Timeline, out: &Path, force: bool) -> Result<(), Failure> {
    let failed = |error| While::new(format!("cannot write {}", shown(out)), error);
    let mut options = fs::File::options();
    options.write(true);
    let options = if force { options.create(true).truncate(true) } else { options.create_new(true) };
    let mut file = options.open(out).map_err(failed)?;
    std::io::Write::write_all(&mut file, svg::draw(found).as_bytes()).map_err(failed)?;
    say(&format!("wrote {}", shown(out)));
    Ok(())
}

fn side(side: Side) -> &'static str {
    if side == Side::Source { "source" } else { "destination" }
}

fn json_of(found: &Timeline) -> Value {
    let flow = |flow: &Flow| {
        json!({
            "bytes": flow.bytes,
            "last-ms": flow.last.map(ms),
            "waited-for-sender-ms": ms(flow.waited_for_sender),
            "waited-for-receiver-ms": ms(flow.waited_for_receiver),
            "held-ms": ms(flow.held),
            "closed-ms": flow.closed.map(ms),
            "broken": flow.broken,
        })
    };
    let channel = |line: &ChannelLine| {
        json!({
            "packets": line.packets,
            "normal": line.normal,
            "zero": line.zero,
            "payload-bytes": line.payload,
            "syncs-ms": line.syncs.iter().map(|at| ms(*at)).collect::<Vec<_>>(),
            "unreadable": line.unreadable,
        })
    };
    let connections: Vec<Value> = found
        .connections
        .iter()
        .map(|connection| {
            json!({
                "number": connection.number.number(),
                "name": name(connection),
                "opened-ms": ms(connection.opened),
                "source": flow(&connection.source),
                "destination": flow(&connection.destination),
                "packets": connection.channel.as_ref().map(channel),
            })
        })
        .collect();
    let moments: Vec<Value> = found
        .moments
        .iter()
        .map(|moment| {
            json!({ "at-ms": ms(moment.at), "side": side(moment.side), "step": moment.step.to_string() })
        })
        .collect();
    json!({
        "form": "recording",
        "length-ms": ms(found.length),
        "ending": ending(&found.ending),
        "complete": found.ending == Ending::Complete,
        "connections": connections,
        "moments": moments,
        "moments-omitted": found.omitted,
        "page-requests": found.requests,
        "downtime": found.downtime.map(|parts| json!({
            "before-last-pass-ms": ms(parts.before),
            "last-pass-ms": ms(parts.ram),
            "devices-ms": ms(parts.devices),
            "reply-ms": parts.reply.map(ms),
        })),
    })
}

fn ending(ending: &Ending) -> String {
    match ending {
        Ending::Complete => "complete".to_owned(),
        Ending::GivenUp(why) => format!("the recorder ended it before the migration: {why}"),
        Ending::Cut(rest) => {
            format!(
                "incomplete: the recorder was killed or is still running ({rest} bytes of a record follow)"
            )
        }
    }
}

fn lines(found: &Timeline) -> Vec<String> {
    let mut lines = vec![
        format!("recording of a migration, {:.3} s, {}", found.length.as_secs_f64(), ending(&found.ending)),
        String::new(),
        format!(
            "{:<12} {:>12} {:>12} {:>10} {:>10} {:>8}  end",
            "connection", "source", "destination", "sender ms", "receiv. ms", "disk ms"
        ),
    ];
    for connection in &found.connections {
        let flow = &connection.source;
        let end = match (&flow.broken, &connection.destination.broken, flow.closed) {
            (Some(why), ..) | (_, Some(why), _) => format!("broken: {why}"),
            (_, _, Some(at)) => format!("closed at {:.1} ms", ms(at)),
            _ => "open".to_owned(),
        };
        lines.push(format!(
            "{:<12} {:>12} {:>12} {:>10.1} {:>10.1} {:>8.1}  {end}",
            name(connection),
            BinaryBytes(flow.bytes).to_string(),
            BinaryBytes(connection.destination.bytes).to_string(),
            ms(flow.waited_for_sender),
            ms(flow.waited_for_receiver),
            ms(flow.held),
        ));
    }
    let channels: Vec<String> = found.connections.iter().filter_map(channel_line).collect();
    if !channels.is_empty() {
        lines.push(String::new());
        lines.extend(channels);
    }
    if !found.moments.is_empty() {
        lines.push(String::new());
        lines.push(format!("{:>12}  main connection", "ms"));
        lines.extend(found.moments.iter().map(|moment| {
            let arrow = if moment.side == Side::Source { "▶" } else { "◀" };
            format!("{:>12.3} {arrow} {}", ms(moment.at), moment.step)
        }));
    }
    if found.omitted > 0 {
        lines.push(format!("{} more", HumanCount(found.omitted)));
    }
    if found.requests > 0 {
        lines.push(format!("{} requests for pages", HumanCount(found.requests)));
    }
    if let Some(parts) = found.downtime {
        lines.push(String::new());
        lines.push("downtime, as far as the stream shows it:".to_owned());
        lines.push(format!(
            "{:>12.3} ms before the last pass, in which the source stops the guest",
            ms(parts.before)
        ));
        lines.push(format!("{:>12.3} ms last pass over RAM", ms(parts.ram)));
        lines.push(format!("{:>12.3} ms device state", ms(parts.devices)));
        lines.push(match parts.reply {
            Some(reply) => format!("{:>12.3} ms until SHUT of the destination", ms(reply)),
            None => format!("{:>12} the destination has sent no SHUT", ""),
        });
    }
    lines
}

fn channel_line(connection: &Connection) -> Option<String> {
    let line = connection.channel.as_ref()?;
    let error = line.unreadable.as_ref().map(|why| format!("; cannot be parsed further: {why}"));
    Some(format!(
        "{}: {} packets, {} SYNC, {} pages with data, {} zero pages{}",
        name(connection),
        HumanCount(line.packets),
        HumanCount(line.syncs.len() as u64),
        HumanCount(line.normal),
        HumanCount(line.zero),
        error.unwrap_or_default()
    ))
}
