//! The main connection of a recording: its events and the messages of the destination, with times.

use multifd::ram::PageSize;

use super::{Bytes, ConnectionNumber, Downtime, Moment, OneWay, Recording, Side, Step};
use crate::{
    error::StreamKind,
    format::{Command, Event, Message, Reader},
    incoming::Events,
};

/// What the main connection shows.
#[derive(Debug, Default)]
pub(super) struct MainStream {
    pub(super) moments: Vec<Moment>,
    pub(super) omitted: u64,
    pub(super) requests: u64,
    pub(super) page_size: Option<PageSize>,
}

impl MainStream {
    pub(super) fn read<B: Bytes>(recording: &Recording<B>, connection: ConnectionNumber) -> Self {
        let mut found = Self::default();
        found.source(recording, connection);
        found.destination(recording, connection);
        found.moments.sort_by_key(|moment| moment.at);
        found
    }

    fn source<B: Bytes>(&mut self, recording: &Recording<B>, connection: ConnectionNumber) {
        let mut events = Events::new(OneWay::new(recording, connection, Side::Source));
        let mut in_devices = false;
        loop {
            let step = match events.next() {
                Ok(Event::Configuration(found)) => {
                    Step::Configuration(found.map(|found| found.machine.to_string()))
                }
                Ok(Event::Command(command)) => Step::Command(shown(command)),
                Ok(Event::Blocks { blocks, .. }) => {
                    self.page_size = Some(blocks.page_size());
                    Step::Blocks { count: blocks.iter().count() as u64, bytes: blocks.total() }
                }
                Ok(Event::Pass { last }) => Step::Pass { last },
                Ok(Event::SyncPoint(_)) => Step::SyncPoint,
                Ok(Event::EndOfRam) => Step::EndOfRam,
                Ok(Event::Devices(_)) if !in_devices => {
                    in_devices = true;
                    Step::Devices
                }
                Ok(Event::End(_)) => Step::End,
                Ok(_) => continue,
                Err(error) => Step::Unreadable(error.to_string()),
            };
            let at = events.get_ref().arrived(events.here().offset.saturating_sub(1));
            let ends = matches!(step, Step::End | Step::Unreadable(_));
            self.note(Moment { at, side: Side::Source, step });
            if ends {
                return;
            }
        }
    }

    fn destination<B: Bytes>(&mut self, recording: &Recording<B>, connection: ConnectionNumber) {
        let way = OneWay::new(recording, connection, Side::Destination);
        let mut reader = Reader::new(way, StreamKind::ReturnPath);
        loop {
            let step = match Message::decode(&mut reader) {
                Ok(None) => return,
                Ok(Some(Message::ReqPages { .. })) => {
                    self.requests += 1;
                    continue;
                }
                Ok(Some(message)) => Step::Message(named(&message)),
                Err(error) => Step::Unreadable(error.to_string()),
            };
            let at = reader.get_ref().arrived(reader.position().saturating_sub(1));
            let ends = matches!(step, Step::Unreadable(_));
            self.note(Moment { at, side: Side::Destination, step });
            if ends {
                return;
            }
        }
    }

    fn note(&mut self, moment: Moment) {
        // The end is always kept.
        let is_end = matches!(moment.step, Step::End | Step::EndOfRam | Step::Unreadable(_) | Step::Devices);
        if self.moments.len() < MOMENTS || is_end {
            self.moments.push(moment);
        } else {
            self.omitted += 1;
        }
    }

    /// The parts of the downtime; `None` if the last pass or its end is not there.
    pub(super) fn downtime(&self) -> Option<Downtime> {
        let of_source = || self.moments.iter().filter(|moment| moment.side == Side::Source);
        let at = |wanted: fn(&Step) -> bool| of_source().find(|moment| wanted(&moment.step)).map(|at| at.at);
        let runs = |step: &Step| matches!(step, Step::Command(name) if name == "POSTCOPY_RUN");
        if of_source().any(|moment| runs(&moment.step)) {
            return None;
        }
        let last = at(|step| matches!(step, Step::Pass { last: true }))?;
        let ram = at(|step| matches!(step, Step::EndOfRam))?;
        let end = at(|step| matches!(step, Step::End))?;
        let before =
            of_source().take_while(|moment| moment.step != Step::Pass { last: true }).last().map(|at| at.at);
        let shut = self.moments.iter().find(|moment| {
            moment.side == Side::Destination
                && matches!(&moment.step, Step::Message(text) if text.starts_with("SHUT"))
        });
        Some(Downtime {
            before: before.map(|before| last.saturating_sub(before)).unwrap_or_default(),
            ram: ram.saturating_sub(last),
            devices: end.saturating_sub(ram),
            reply: shut.map(|shut| shut.at.saturating_sub(end)),
        })
    }
}

fn shown(command: &Command) -> String {
    match command {
        Command::Ping(value) => format!("PING {value:#x}"),
        Command::Packaged(bytes) => format!("PACKAGED, {bytes} bytes"),
        other => other.name().to_owned(),
    }
}

fn named(message: &Message) -> String {
    match message {
        Message::Shut(value) => format!("SHUT {value}"),
        Message::Pong(value) => format!("PONG {value:#x}"),
        Message::ReqPages { .. } => "REQ_PAGES".to_owned(),
        Message::RecvBitmap { block, .. } => format!("RECV_BITMAP {block}"),
        Message::ResumeAck => "RESUME_ACK".to_owned(),
        Message::SwitchoverAck => "SWITCHOVER_ACK".to_owned(),
        Message::Reason(text) => format!("reason: {text}"),
    }
}

/// The greatest number of moments that are kept.
const MOMENTS: usize = 10_000;
