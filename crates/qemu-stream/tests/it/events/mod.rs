//! The main stream event by event: which events a stream has, in which order, and where they end.

mod order;
mod qemu;
mod written;

use qemu_stream::{
    error::Error,
    format::Section,
    incoming::{Event, Events, SyncMark},
};

/// What an event is, in a word or two.
fn name(event: &Event<'_>) -> String {
    match event {
        Event::Configuration(configuration) => {
            configuration.map_or("no configuration".to_owned(), |found| found.machine.to_string())
        }
        Event::Command(command) => command.name().to_owned(),
        Event::OtherSection { head, bytes } => {
            let name = match head {
                Section::Start(head) | Section::Full(head) => head.name.to_string(),
                Section::Part(id) | Section::End(id) => id.to_string(),
                other => panic!("{other:?} is no section"),
            };
            format!("{} {name} {}", head.name(), bytes.len())
        }
        Event::Blocks { blocks, .. } => format!("{} blocks", blocks.entries().len()),
        Event::SyncMode(mode) => format!("{mode:?}"),
        Event::SyncPoint(SyncMark::Flush) => "sync at flush".to_owned(),
        Event::SyncPoint(SyncMark::Eos) => "sync at eos".to_owned(),
        Event::Eos => "eos".to_owned(),
        Event::SectionEnd { footer } => (if *footer { "footer" } else { "no footer" }).to_owned(),
        Event::Pass { last } => (if *last { "last pass" } else { "pass" }).to_owned(),
        Event::ZeroPage { block, page } => format!("zero {}:{page}", block.0),
        Event::Page { block, page, bytes } => format!("page {}:{page} of {}", block.0, bytes[0]),
        Event::Xbzrle { block, page, delta } => {
            format!("delta {}:{page} {}", block.0, delta.as_bytes().len())
        }
        Event::EndOfRam => "end of ram".to_owned(),
        Event::Devices(_) => "devices".to_owned(),
        Event::End(devices) => format!("{} devices", devices.sections().len()),
        other => panic!("{other:?} is new"),
    }
}

/// The events of a stream up to its end or its error; what comes of the devices at once is one.
fn names(stream: &[u8]) -> (Vec<String>, Option<Error>) {
    let mut events = Events::new(stream);
    let mut names: Vec<String> = Vec::new();
    loop {
        match events.next() {
            Ok(event) => {
                let name = name(&event);
                if name != "devices" || names.last().is_none_or(|last| *last != name) {
                    names.push(name);
                }
                if matches!(event, Event::End(_)) {
                    return (names, None);
                }
            }
            Err(error) => return (names, Some(error)),
        }
    }
}
