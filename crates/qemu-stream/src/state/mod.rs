//! The state of the devices as a tree of fields with names, read by the description that the source has sent.
//!
//! ```text
//! closing JSON ─▶ Described (names, types, sizes; checked) ┐
//! sections of the device part ─ their bodies ──────────────┴─▶ Devices ─▶ DeviceState ─▶ Field ─▶ Value
//! ```
//!
//! The tree is a view: a field is a piece of its section and of the description, and is decoded when it is asked for. So a
//! description uses no more memory than its text does, even if it announces arrays of many elements. [`Devices::of`] checks
//! once that the fields of every device cover its section exactly; after that, no field can be outside of it.
//!
//! What a value means is known to QEMU alone. Numbers are big-endian; every type whose meaning is not known is bytes.

#![warn(clippy::indexing_slicing)]

mod described;
mod field;

use std::{collections::HashMap, fmt};

use described::Described;

pub use field::{Array, Field, Fields, Value};

use crate::format::{DevicePart, DeviceSection, SectionName};

/// Why the state of devices cannot be shown as fields.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// There is no description.
    #[error(
        "the devices are not described: the source had suppress-vmdesc on, a machine type up to 2.2, or switched to post-copy"
    )]
    NotDescribed,
    /// The description is not JSON of the known form.
    #[error("the description of the devices cannot be read")]
    Shape(#[from] serde_json::Error),
    /// The sizes in the description contradict each other, or the section.
    #[error("device {device}: the sizes of the fields of \"{field}\" are not that of the whole")]
    Sizes {
        /// The device.
        device: String,
        /// The field, or the device itself.
        field: String,
    },
}

/// All devices of a machine.
#[derive(Debug)]
pub struct Devices<'a> {
    part: &'a DevicePart,
    /// For each section that is described: its number and its description.
    described: Vec<(usize, Described)>,
}

/// The state of one device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceState<'a> {
    section: &'a DeviceSection,
    body: &'a [u8],
    described: &'a Described,
}

impl<'a> Devices<'a> {
    /// Reads the description of the devices, and checks that it fits their sections.
    ///
    /// # Errors
    /// If there is none, or it does not fit.
    pub fn of(part: &'a DevicePart) -> Result<Self, StateError> {
        let json = part.description().filter(|_| !part.is_split_by_footers());
        let parsed = described::parse(json.ok_or(StateError::NotDescribed)?)?;
        let mut described = Vec::new();
        let sections = part.sections().iter().enumerate();
        let sections: HashMap<_, _> =
            sections.map(|of| ((of.1.name.as_bytes(), of.1.instance), of)).collect();
        for device in parsed {
            // QEMU shows numbers above 2^31 as negative ones.
            let instance = u32::try_from(device.instance_id & i64::from(u32::MAX)).unwrap_or_default();
            // Sections that are sent in pieces are described, too.
            let Some(&(number, section)) = sections.get(&(device.name.as_bytes(), instance)) else {
                continue;
            };
            let body = part.body(section).map_or(0, <[u8]>::len);
            device.check(body as u64).map_err(|field| {
                let device = format!("{}:{}", section.name, section.instance);
                StateError::Sizes { device, field }
            })?;
            described.push((number, device));
        }
        Ok(Self { part, described })
    }

    /// The devices, in the order of the stream.
    pub fn iter(&self) -> impl Iterator<Item = DeviceState<'_>> {
        self.described.iter().filter_map(|(number, described)| {
            let section = self.part.sections().get(*number)?;
            Some(DeviceState { section, body: self.part.body(section)?, described })
        })
    }

    /// The device with this name and instance.
    pub fn find(&self, name: &str, instance: u32) -> Option<DeviceState<'_>> {
        self.iter().find(|device| {
            device.section.name.as_bytes() == name.as_bytes() && device.section.instance == instance
        })
    }
}

impl<'a> DeviceState<'a> {
    /// Its name.
    pub fn name(&self) -> &'a SectionName {
        &self.section.name
    }

    /// The number that distinguishes devices with this name.
    pub fn instance(&self) -> u32 {
        self.section.instance
    }

    /// The version of its state.
    pub fn version(&self) -> u32 {
        self.section.version
    }

    /// Its state, as in the stream.
    pub fn bytes(&self) -> &'a [u8] {
        self.body
    }

    /// Its fields, and its subsections as fields of the kind `subsection`.
    pub fn fields(&self) -> Fields<'a> {
        Fields::new(&self.described.fields, &self.described.subsections, self.body)
    }

    /// The value of the first field with this name, if it is not within another one.
    pub fn value(&self, name: &str) -> Option<Value<'a>> {
        self.fields().find(|field| field.name() == name).map(|field| field.value())
    }
}

impl fmt::Display for DeviceState<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.section.name, self.section.instance)
    }
}

#[cfg(test)]
mod tests;
