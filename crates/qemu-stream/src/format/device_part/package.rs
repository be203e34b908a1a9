//! The package of post-copy: everything that the destination needs before the guest runs there.
//!
//! ```text
//! PACKAGED size │ LISTEN ─ FULL section of each device ─ PING* ─ RUN
//! ```
//!
//! The size of the package is known, those of its devices are not: a stream of post-copy has no description. So the devices are
//! split where a footer of a section is followed by the head of the next one, and are described by what was found there.
//! QEMU skips the description that it reads, so a wrong split cannot change what it loads. Devices that cannot be split stay in
//! one piece without a description.
//!
//! A source of this library has the description of its devices as the first section of the package, with its length, so that they
//! need not be searched for footers. It sends that to destinations of this library only.

use super::{
    DevicePart, DeviceSection, EarlyPart, EndFinder, check_distinct, description,
    walk::{HEAD, head_at},
};
use crate::{
    error::{Error, Malformed, Place, StreamKind, Violation},
    format::{Command, Put, Reader, Section, SectionHead, SectionId, SectionName, encode_footer, limits},
};

/// The contents of a package.
#[derive(Debug)]
pub(crate) struct Package {
    /// The sections of the devices.
    pub(crate) devices: Vec<u8>,
    /// The values of the PINGs behind them.
    pub(crate) pings: Vec<u32>,
}

impl Package {
    /// Takes the commands off a package. `at` is the place of the package, for errors.
    ///
    /// # Errors
    /// If it does not begin with LISTEN or end with RUN, if it contains RUN twice, or if its first or last section is not that of
    /// a device.
    pub(crate) fn parse(mut bytes: Vec<u8>, footers: bool, at: Place) -> Result<Self, Error> {
        let misplaced = |record, place| Violation::Misplaced { record, place }.at(at);
        let listen = encoded(Command::PostcopyListen);
        if !bytes.starts_with(&listen) {
            return Err(misplaced(first(&bytes, at)?, "in a package before POSTCOPY_LISTEN"));
        }
        bytes.drain(..listen.len());
        let run = encoded(Command::PostcopyRun);
        if !strip(&mut bytes, &run) {
            return Err(misplaced("the end of the package", "before POSTCOPY_RUN"));
        }
        let mut pings = Vec::new();
        while let Some(ping) = last_ping(&bytes) {
            if pings.len() == limits::PACKAGE_PINGS {
                let max = limits::PACKAGE_PINGS as u64;
                return Err(Malformed::too_long("number of PINGs in a package", max, max + 1).at(at));
            }
            pings.push(ping);
            bytes.truncate(bytes.len() - PING);
        }
        pings.reverse();
        if bytes.ends_with(&run) {
            return Err(misplaced("POSTCOPY_RUN", "in a package after POSTCOPY_RUN"));
        }
        if !bytes.is_empty() && head_at(&bytes).is_none() {
            return Err(misplaced(first(&bytes, at)?, "in a package in place of a device"));
        }
        bytes.push(EOF);
        let finder = EndFinder::new(footers);
        if !finder.may_have_ended(&bytes) || !finder.is_closed(&bytes) {
            return Err(misplaced("the end of the devices", "within a device of a package"));
        }
        bytes.pop();
        Ok(Self { devices: bytes, pings })
    }
}

impl DevicePart {
    /// The devices for a package, with their description before them: for a destination of this library.
    pub(crate) fn for_package(&self) -> Vec<u8> {
        let json = self.description().unwrap_or_default();
        let mut out = Vec::with_capacity(json.len() + self.blob().len() + HEAD);
        Section::Full(description_head()).encode(&mut out);
        // A description is bounded when it is made.
        out.put(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.put(json);
        encode_footer(DESCRIPTION, &mut out);
        out.put(self.blob());
        out
    }

    /// The part of these devices of a package, which ends at `at`. `early` came before them.
    ///
    /// # Errors
    /// If they are described and do not fit the description.
    pub(crate) fn of_package(
        early: EarlyPart,
        devices: Vec<u8>,
        footers: bool,
        page_size: usize,
        at: Place,
    ) -> Result<Self, Error> {
        let Some((json, rest)) = description_of(&devices) else {
            return Ok(Self::split_package(early, devices, footers, page_size));
        };
        let mut finder = EndFinder::new(footers).early(early);
        let mut bytes = finder.ends().to_vec();
        bytes.put(rest);
        Section::Eof.encode(&mut bytes);
        Section::VmDescription(u32::try_from(json.len()).unwrap_or(u32::MAX)).encode(&mut bytes);
        bytes.put(json);
        let found = finder.find(&mut bytes).map_err(|what| what.at(at))?;
        found.ok_or_else(|| {
            let (record, place) = ("the description of a package", "before devices that it does not fit");
            Violation::Misplaced { record, place }.at(at)
        })
    }

    fn split_package(early: EarlyPart, devices: Vec<u8>, footers: bool, page_size: usize) -> Self {
        let from = early.ends.len();
        let found = split(&devices, from).filter(|_| footers);
        // Mostly without a copy: few machines have sections that are sent in pieces.
        let mut bytes = devices;
        bytes.splice(..0, early.ends);
        let eof = bytes.len();
        Section::Eof.encode(&mut bytes);
        let mut part = Self {
            early: early.bytes,
            bytes,
            eof,
            json: None,
            sections: early.sections,
            live: early.live,
            footers,
            derived: false,
        };
        let Some(found) = found else { return part };
        let all: Vec<DeviceSection> = part.sections.iter().cloned().chain(found).collect();
        let described = all.iter().map(|of| (&of.name, of.instance, of.version, of.body.len()));
        let json = description::derive(described, page_size);
        let length = json.as_ref().and_then(|json| u32::try_from(json.len()).ok());
        if let (Some(json), Some(length), Ok(())) =
            (json, length.filter(|length| *length <= limits::DESCRIPTION), check_distinct(&all))
        {
            Section::VmDescription(length).encode(&mut part.bytes);
            part.bytes.put(&json);
            part.json = Some(eof + Self::END_HEAD);
            (part.sections, part.derived) = (all, true);
        }
        part
    }
}

/// The sections of a package, without the description before them.
pub(crate) fn devices_of_package(sections: &[u8]) -> &[u8] {
    description_of(sections).map_or(sections, |(_, devices)| devices)
}

/// The description before these devices, if there is one, and the devices after it.
fn description_of(devices: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut head = Vec::new();
    Section::Full(description_head()).encode(&mut head);
    let rest = devices.strip_prefix(&head[..])?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (json, rest) = rest.split_at_checked(length)?;
    let mut footer = Vec::with_capacity(FOOTER);
    encode_footer(DESCRIPTION, &mut footer);
    Some((json, rest.strip_prefix(&footer[..])?))
}

fn description_head() -> SectionHead {
    let name = SectionName::new("multifd/description").expect("a short name");
    SectionHead { id: DESCRIPTION, name, instance: 0, version: 1 }
}

/// The sections in `devices`, whose bodies begin `from` bytes later; `None` if there is no way to split them.
fn split(devices: &[u8], from: usize) -> Option<Vec<DeviceSection>> {
    let mut sections = Vec::new();
    let mut at = 0;
    while at < devices.len() {
        let (head, length) = head_at(devices.get(at..)?)?;
        if sections.len() == limits::DEVICES {
            return None;
        }
        let body = at + length;
        let mut footer = Vec::with_capacity(FOOTER);
        encode_footer(head.id, &mut footer);
        let ends = devices.get(body..)?.windows(FOOTER).enumerate();
        let mut ends = ends.filter(|(_, bytes)| *bytes == footer).map(|(at, _)| body + at);
        let end = ends.find(|end| devices.get(end + FOOTER..).is_some_and(follows))?;
        let SectionHead { id, name, instance, version } = head;
        let body = from + body..from + end;
        sections.push(DeviceSection { name, instance, version, id, body, early: false });
        at = end + FOOTER;
    }
    Some(sections)
}

/// Whether `rest` may follow a section: nothing, or the head of another one.
fn follows(rest: &[u8]) -> bool {
    let printable = |head: &SectionHead| head.name.as_bytes().iter().all(|byte| (b' '..=b'~').contains(byte));
    rest.is_empty() || head_at(rest).is_some_and(|(head, _)| printable(&head))
}

/// The name of the first record of these bytes.
fn first(bytes: &[u8], at: Place) -> Result<&'static str, Error> {
    if bytes.is_empty() {
        return Ok("the end of the package");
    }
    let mut r = Reader::with_capacity(bytes, StreamKind::Main, HEAD);
    // The place of the error would be that of another stream.
    let unknown = |_| {
        Malformed::value("section in a package", "0x0 to 0x8", bytes.first().copied().unwrap_or_default())
    };
    Section::decode(&mut r).map(|found| found.name()).map_err(|error| unknown(error).at(at))
}

fn last_ping(bytes: &[u8]) -> Option<u32> {
    let (_, ping) = bytes.split_last_chunk::<PING>()?;
    let (head, value) = ping.split_last_chunk::<4>()?;
    let value = u32::from_be_bytes(*value);
    encoded(Command::Ping(value)).starts_with(head).then_some(value)
}

fn strip(bytes: &mut Vec<u8>, end: &[u8]) -> bool {
    let found = bytes.ends_with(end);
    if found {
        bytes.truncate(bytes.len() - end.len());
    }
    found
}

fn encoded(command: Command) -> Vec<u8> {
    let mut bytes = Vec::new();
    Section::Command(command).encode(&mut bytes);
    bytes
}

/// No other section has this number: sources number theirs upwards.
const DESCRIPTION: SectionId = SectionId(u32::MAX);
const EOF: u8 = 0x00;
/// The bytes of a PING, with the type of a section before it.
const PING: usize = 9;
/// Type and id.
const FOOTER: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Device, testing::section_name};

    const AT: Place = Place { stream: StreamKind::Main, offset: 7 };

    fn device(id: u32, name: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let head = SectionHead { id: SectionId(id), name: section_name(name), instance: 0, version: 1 };
        Section::Full(head).encode(&mut bytes);
        bytes.put(body);
        encode_footer(SectionId(id), &mut bytes);
        bytes
    }

    fn package(pieces: &[&[u8]]) -> Result<Package, Error> {
        Package::parse(pieces.concat(), true, AT)
    }

    fn part(devices: &[u8]) -> DevicePart {
        DevicePart::of_package(EarlyPart::default(), devices.to_vec(), true, 4096, AT).unwrap()
    }

    #[test]
    fn commands_are_taken_off() {
        let devices = [device(3, "timer", b"abc"), device(4, "rtc", &[0x7e, 0, 0, 0, 4])].concat();
        let listen = encoded(Command::PostcopyListen);
        let run = encoded(Command::PostcopyRun);
        let found =
            package(&[&listen, &devices, &encoded(Command::Ping(3)), &encoded(Command::Ping(0x42)), &run]);
        let found = found.unwrap();
        assert_eq!((found.devices, found.pings), (devices.clone(), vec![3, 0x42]));
        let found = package(&[&listen, &devices, &run]).unwrap();
        assert_eq!((found.devices, found.pings), (devices, vec![]));
    }

    #[test]
    fn what_is_no_package_is_refused_by_name() {
        let (listen, run) = (encoded(Command::PostcopyListen), encoded(Command::PostcopyRun));
        let packaged = encoded(Command::Packaged(1));
        let good = device(3, "timer", b"abc");
        let mut open = good.clone();
        open.pop();
        let pings = encoded(Command::Ping(3)).repeat(limits::PACKAGE_PINGS + 1);
        for (pieces, expected) in [
            (vec![], "the end of the package is not allowed in a package before POSTCOPY_LISTEN"),
            (vec![&good, &run], "FULL is not allowed in a package before POSTCOPY_LISTEN"),
            (vec![&packaged], "PACKAGED is not allowed in a package before POSTCOPY_LISTEN"),
            (vec![&listen, &packaged, &run], "PACKAGED is not allowed in a package in place of a device"),
            (vec![&listen, &good], "the end of the package is not allowed before POSTCOPY_RUN"),
            (vec![&listen, &good, &run, &run], "POSTCOPY_RUN is not allowed in a package after POSTCOPY_RUN"),
            (
                vec![&listen, &open, &run],
                "the end of the devices is not allowed within a device of a package",
            ),
            (vec![&listen, &good, &pings, &run], "number of PINGs in a package"),
        ] {
            let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_slice()).collect();
            let error = package(&pieces).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.to_string().contains("0x7"), "{error}");
        }
    }

    #[test]
    fn devices_are_split_and_their_description_is_found_again() {
        // The second one contains what looks like its own footer.
        let second = [&[0x7e, 0, 0, 0, 9][..], b"\x04\0\0\0\x01\0no name"].concat();
        let devices = [device(3, "timer", b"abc"), device(9, "0000:00:02.0/vga", &second)].concat();
        let part = part(&devices);
        assert_eq!(part.blob(), devices);
        assert!(part.is_split_by_footers());
        let bodies: Vec<_> = part.sections().iter().map(|section| part.body(section).unwrap()).collect();
        assert_eq!(bodies, [b"abc", &second[..]]);
        let mut again = part.as_bytes().to_vec();
        let found = EndFinder::new(true).find(&mut again).unwrap();
        assert_eq!(found, Some(part));
    }

    /// The first device contains its own footer and the head of the next section.
    #[test]
    fn described_devices_have_lengths() {
        let inner = [&[0x7e, 0, 0, 0, 3][..], &device(4, "rtc", b"")].concat();
        let devices = [("timer", &inner[..]), ("rtc", b"abc")];
        let devices = devices.map(|(name, state)| Device {
            name: section_name(name),
            instance: 0,
            version: 1,
            state: state.to_vec(),
        });
        let built = DevicePart::build(&devices, 4096, SectionId(3)).unwrap();
        assert_eq!(part(&built.for_package()), built);
        let mut bytes = built.for_package();
        bytes.truncate(bytes.len() - 1);
        DevicePart::of_package(EarlyPart::default(), bytes, true, 4096, AT).unwrap_err();
    }

    #[test]
    fn devices_that_cannot_be_split_stay_in_one_piece() {
        let twice = [device(3, "timer", b"abc"), device(4, "timer", b"abc")].concat();
        let other = [device(3, "timer", b"abc"), b"no section".to_vec(), device(4, "rtc", b"")].concat();
        for devices in [twice, other] {
            let part = part(&devices);
            assert_eq!((part.blob(), part.description()), (&devices[..], None));
            assert_eq!(part.as_bytes().len(), devices.len() + 1);
        }
    }
}
