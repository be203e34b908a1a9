//! Everything behind the RAM section: devices, EOF, and the JSON that tells them apart.
//!
//! ```text
//! 04 id name instance version body [7e id]   per device; a body has no length
//! 00                                         EOF
//! 06 length {"page_size": …, "devices": […]} sums of sizes, from which the bodies' lengths follow
//! ```
//!
//! Devices are carried, never interpreted. What is known of a body is where it begins and ends.

mod description;
mod end;
mod walk;

use std::ops::Range;

pub use description::Description;
pub use end::EndFinder;
pub use walk::Misfit;

use super::{Put, Section, SectionHead, SectionId, SectionName, encode_footer, limits};
use crate::error::CallerMistake;

/// One device section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// Its name.
    pub name: SectionName,
    /// Which of several of that name.
    pub instance: u32,
    /// The version of its body.
    pub version: u32,
    /// The number the source gave the section.
    pub id: SectionId,
    /// Where its body lies in the device part.
    pub body: Range<usize>,
}

/// The bytes behind the RAM section, split and complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePart {
    bytes: Vec<u8>,
    eof: usize,
    json: usize,
    sections: Vec<DeviceSection>,
    footers: bool,
}

/// A device of an embedder's own, to be sent as one section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: SectionName,
    /// Which of several of that name.
    pub instance: u32,
    /// The version of its state.
    pub version: u32,
    /// Its state.
    pub state: Vec<u8>,
}

impl DevicePart {
    /// Bytes from EOF to the JSON: EOF, the section type and its length.
    const END_HEAD: usize = 6;

    /// The device part of these devices, for a machine that is not QEMU's. Their sections are
    /// numbered upwards from `first_id`.
    ///
    /// # Errors
    /// If the devices are more, or longer, than a reader takes.
    pub fn build(devices: &[Device], page_size: u32, first_id: SectionId) -> Result<Self, CallerMistake> {
        let refused = |why: String| CallerMistake::Value { what: "devices", why };
        let size: usize = devices.iter().map(|device| device.state.len()).sum();
        if devices.len() > limits::DEVICES || size > limits::DEVICE_PART / 2 {
            return Err(refused(format!("{} with {size:#x} bytes are too many", devices.len())));
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
            });
        }
        let json = description::describe(devices, page_size)?;
        let length = u32::try_from(json.len()).ok().filter(|length| *length <= limits::DESCRIPTION);
        let length = length.ok_or_else(|| refused(format!("{} are too many to describe", devices.len())))?;
        let eof = bytes.len();
        Section::Eof.encode(&mut bytes);
        Section::VmDescription(length).encode(&mut bytes);
        bytes.put(&json);
        Ok(Self { bytes, eof, json: eof + Self::END_HEAD, sections, footers: true })
    }

    /// All of it, as it stands in the stream: sections, EOF, VMDESCRIPTION.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The sections alone, without EOF.
    pub fn blob(&self) -> &[u8] {
        &self.bytes[..self.eof]
    }

    /// The JSON.
    pub fn description(&self) -> &[u8] {
        &self.bytes[self.json..]
    }

    /// The devices, in the order of the stream.
    pub fn sections(&self) -> &[DeviceSection] {
        &self.sections
    }

    /// Whether its sections have footers, as all have but those of machine types up to 2.3.
    pub fn has_footers(&self) -> bool {
        self.footers
    }

    /// The body of a section of this part; `None` for one of another.
    pub fn body(&self, section: &DeviceSection) -> Option<&[u8]> {
        self.blob().get(section.body.clone())
    }
}

#[cfg(test)]
mod tests;
