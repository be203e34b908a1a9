//! Everything after the RAM section: devices, EOF, and the JSON that separates them.
//!
//! ```text
//! 04 id name instance version body [7e id]   per device; a body has no length
//! 00                                         EOF
//! 06 length {"page_size": …, "devices": […]} sums of sizes, from which the bodies' lengths follow
//! ```
//!
//! Devices are forwarded, never interpreted. Only the beginning and the end of a body are known. Without the JSON
//! (machine option suppress-vmdesc, machine types up to 2.2) these are unknown, too: the part stays in one piece.

mod description;
mod device;
mod early;
mod end;
mod live;
mod misfit;
mod package;
mod walk;

use std::{collections::HashSet, ops::Range};

use multifd::live::RunState;

pub use description::Description;
pub use device::Device;
pub use early::EarlyPart;
pub use end::EndFinder;
pub use live::LiveSection;
pub use misfit::Misfit;
pub(crate) use package::{Package, devices_of_package};

use super::{Put, Section, SectionHead, SectionId, SectionName, encode_footer, limits, run_state};
use crate::error::{Usage, Violation};

/// One device section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// Its name.
    pub name: SectionName,
    /// The number that distinguishes devices with this name.
    pub instance: u32,
    /// The version of its body.
    pub version: u32,
    /// The section's number, assigned by the source.
    pub id: SectionId,
    /// The range of its body: in the device part, or among the early devices.
    pub body: Range<usize>,
    /// Whether it arrived before the end of RAM.
    pub early: bool,
}

/// The bytes after the RAM section, complete and, if they are described, split. It includes what was sent before the
/// end of RAM, devices and pieces of [live sections](LiveSection). The last pieces of live sections come before the
/// devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePart {
    early: Vec<u8>,
    bytes: Vec<u8>,
    eof: usize,
    json: Option<usize>,
    sections: Vec<DeviceSection>,
    live: Vec<LiveSection>,
    footers: bool,
    derived: bool,
}

impl DevicePart {
    /// The bytes from EOF to the JSON: EOF, the section type and its length.
    const END_HEAD: usize = 6;

    /// Creates the device part of these devices, for a machine that is not QEMU's. Their sections are numbered upwards
    /// from `first_id`.
    ///
    /// # Errors
    /// If there are more or longer devices than a reader accepts, or two with the same name and instance.
    pub fn build(devices: &[Device], page_size: u32, first_id: SectionId) -> Result<Self, Usage> {
        let refused = |why: String| Usage::Value { what: "devices", why };
        let size: usize = devices.iter().map(|device| device.state.len()).sum();
        if devices.len() > limits::DEVICES || size > limits::DEVICE_PART / 2 {
            let (count, most, bytes) = (devices.len(), limits::DEVICES, limits::DEVICE_PART / 2);
            let why =
                format!("expected at most {most} with {bytes:#x} bytes, found {count} with {size:#x} bytes");
            return Err(refused(why));
        }
        let mut bytes = Vec::with_capacity(size);
        let mut sections = Vec::new();
        for (device, number) in devices.iter().zip(0..) {
            let id = SectionId(first_id.0.wrapping_add(number));
            let Device { name, instance, version, state } = device;
            let head = SectionHead { id, name: name.clone(), instance: *instance, version: *version };
            Section::Full(head).encode(&mut bytes);
            let body = bytes.len()..bytes.len() + state.len();
            bytes.put(state);
            encode_footer(id, &mut bytes);
            sections.push(DeviceSection {
                name: name.clone(),
                instance: *instance,
                version: *version,
                id,
                body,
                early: false,
            });
        }
        check_distinct(&sections).map_err(|twice| refused(twice.to_string()))?;
        let json = description::describe(devices, page_size)?;
        let length = u32::try_from(json.len()).ok().filter(|length| *length <= limits::DESCRIPTION);
        let length = length.ok_or_else(|| refused(format!("{} are too many to describe", devices.len())))?;
        let eof = bytes.len();
        Section::Eof.encode(&mut bytes);
        Section::VmDescription(length).encode(&mut bytes);
        bytes.put(&json);
        let json = Some(eof + Self::END_HEAD);
        Ok(Self {
            early: Vec::new(),
            bytes,
            eof,
            json,
            sections,
            live: Vec::new(),
            footers: true,
            derived: false,
        })
    }

    /// All bytes after the end of RAM, as in the stream: last pieces of live sections, devices, EOF, VMDESCRIPTION.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The sections alone, without EOF.
    pub fn blob(&self) -> &[u8] {
        self.bytes.get(..self.eof).unwrap_or_default()
    }

    /// The sections that arrived before the end of RAM. They must be sent there again.
    pub fn early(&self) -> &[u8] {
        &self.early
    }

    /// The JSON; `None` if the source did not send it.
    pub fn description(&self) -> Option<&[u8]> {
        self.json.and_then(|json| self.bytes.get(json..))
    }

    /// Whether the description is not the source's: the devices arrived by post-copy, without a description, and were split at
    /// the footers of their sections.
    pub fn is_split_by_footers(&self) -> bool {
        self.derived
    }

    /// The devices, in the order of the stream; without a [description](Self::description), only the early ones.
    pub fn sections(&self) -> &[DeviceSection] {
        &self.sections
    }

    /// The live sections, in the order in which they began.
    pub fn live(&self) -> &[LiveSection] {
        &self.live
    }

    /// Whether its sections have footers; only sections of machine types up to 2.3 have none.
    pub fn has_footers(&self) -> bool {
        self.footers
    }

    /// The device with this name and instance: its section and its state.
    pub fn find(&self, name: &str, instance: u32) -> Option<(&DeviceSection, &[u8])> {
        let of = |section: &&DeviceSection| {
            section.name.as_bytes() == name.as_bytes() && section.instance == instance
        };
        let section = self.sections().iter().find(of)?;
        Some((section, self.body(section)?))
    }

    /// Whether the guest ran at its source; `None` if the devices do not contain this.
    pub fn run_state(&self) -> Option<RunState> {
        run_state::decode(self.find(run_state::NAME, 0)?.1)
    }

    /// Refuses the part if one of its sections has the RAM section's number: a destination finds the section of a piece
    /// only by its number.
    ///
    /// # Errors
    /// [`Usage::SectionTaken`]. Devices without a description cannot be checked.
    pub(crate) fn check_beside(&self, ram: SectionId) -> Result<(), Usage> {
        let devices = self.sections.iter().map(|section| (section.id, &section.name));
        let live = self.live.iter().map(|section| (section.id, &section.name));
        match devices.chain(live).find(|(id, _)| *id == ram) {
            Some((section, name)) => Err(Usage::SectionTaken { section, device: name.clone() }),
            None => Ok(()),
        }
    }

    /// The body of a section of this part; `None` for a section of another part.
    pub fn body(&self, section: &DeviceSection) -> Option<&[u8]> {
        let bytes = if section.early { self.early() } else { self.blob() };
        bytes.get(section.body.clone())
    }
}

/// Refuses two sections with the same name and instance: a destination loads both, and the last one stays. No QEMU sends
/// such sections.
fn check_distinct(sections: &[DeviceSection]) -> Result<(), Violation> {
    let mut seen = HashSet::with_capacity(sections.len());
    match sections.iter().find(|section| !seen.insert((&section.name, section.instance))) {
        Some(DeviceSection { name, instance, .. }) => {
            Err(Violation::DeviceTwice { name: name.clone(), instance: *instance })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
