//! The file header and the configuration after it.
//!
//! ```text
//! "QEVM" | u32 3 | 07 | u32 length, machine type | subsection*      (07 and what follows: 2.4 and newer)
//! subsection = 05 | counted name | u32 1 | body; only the name determines its length
//! ```

use std::io::Read;

use multifd::{ram::PageSize, wire::VmUuid};

use super::{MachineType, OtherFormat, Put, Reader, SectionName, limits};
use crate::error::{Error, Malformed, Unsupported, Violation};

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
/// The version of a delta, which no other reader may take for a machine: "mfD", 1.
pub(crate) const DELTA_VERSION: u32 = 0x6d66_4401;
const CONFIGURATION: u8 = 0x07;
const SUBSECTION: u8 = 0x05;
const SUBSECTION_VERSION: u32 = 1;
const TARGET_PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";
const IGNORE_SHARED: &str = "x-ignore-shared";
const MAPPED_RAM: &str = "mapped-ram";

/// The properties in the stream on which both sides must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The machine type.
    pub machine: MachineType,
    /// The page size, if the architecture has several and it is not the smallest.
    pub target_page_size: Option<PageSize>,
    /// Whether shared RAM blocks are listed with their address but not sent.
    pub ignore_shared: bool,
    /// Whether pages have fixed places: the stream is a mapped-ram file.
    pub mapped_ram: bool,
    /// The machine's UUID, if it must be compared.
    pub uuid: Option<VmUuid>,
}

impl Configuration {
    /// Creates the configuration of a machine without special properties.
    pub fn new(machine: MachineType) -> Self {
        Self { machine, target_page_size: None, ignore_shared: false, mapped_ram: false, uuid: None }
    }

    /// The page size: the given one, or 4 KiB.
    pub fn page_size(&self) -> PageSize {
        self.target_page_size.unwrap_or_default()
    }

    /// Appends the configuration, its type byte included.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(CONFIGURATION);
        #[expect(clippy::cast_possible_truncation, reason = "a machine type has at most 255 bytes")]
        out.put_u32(self.machine.as_str().len() as u32);
        out.put(self.machine.as_str().as_bytes());
        if let Some(page_size) = self.target_page_size {
            put_subsection(out, TARGET_PAGE_BITS);
            out.put_u32(page_size.bits());
        }
        let named: Vec<&str> = [(self.ignore_shared, IGNORE_SHARED), (self.mapped_ram, MAPPED_RAM)]
            .into_iter()
            .filter_map(|(on, name)| on.then_some(name))
            .collect();
        if !named.is_empty() {
            put_subsection(out, CAPABILITIES);
            out.put_u32(u32::from(self.ignore_shared) + u32::from(self.mapped_ram));
            for name in named {
                put_text(out, name);
            }
        }
        if let Some(uuid) = self.uuid {
            put_subsection(out, UUID);
            out.put(&uuid.0);
        }
    }

    /// Decodes the output of [`Configuration::encode`], type byte included.
    ///
    /// # Errors
    /// If a field is malformed, a subsection is unknown or duplicate, or the stream ends early.
    pub fn decode<R: Read>(r: &mut Reader<R>) -> Result<Self, Error> {
        let kind = r.u8("configuration")?;
        if kind != CONFIGURATION {
            return Err(Malformed::value("configuration", "0x7", kind).at(r.place()));
        }
        let length = r.u32("length of the machine type")?;
        let bytes = r.bytes(length.into(), limits::MACHINE_NAME.into(), "machine type")?;
        let machine = String::from_utf8(bytes).ok().and_then(|name| MachineType::new(name).ok());
        let machine = machine.ok_or_else(|| {
            Malformed::value("machine type of length", "1 to 255 printable bytes", length).at(r.place())
        })?;
        let mut configuration = Self::new(machine);
        let mut capabilities_met = false;
        while r.peek()? == Some(SUBSECTION) {
            let at = r.place();
            r.u8("subsection")?;
            let name = r.section_name("name of a subsection")?;
            let version = r.u32("version of a subsection")?;
            if version != SUBSECTION_VERSION {
                return Err(Malformed::value(format!("version of \"{name}\""), "1", version).at(r.place()));
            }
            let first = match name.as_bytes() {
                known if known == TARGET_PAGE_BITS.as_bytes() => {
                    let bits = r.u32("target page bits")?;
                    let size = PageSize::from_bits(bits);
                    let size = size.ok_or_else(|| Unsupported::PageBits(bits).at(r.place()))?;
                    configuration.target_page_size.replace(size).is_none()
                }
                known if known == CAPABILITIES.as_bytes() => {
                    configuration.decode_capabilities(r)?;
                    !std::mem::replace(&mut capabilities_met, true)
                }
                known if known == UUID.as_bytes() => {
                    let uuid = VmUuid(r.array("uuid")?);
                    configuration.uuid.replace(uuid).is_none()
                }
                _ => return Err(Unsupported::Subsection(name).at(at)),
            };
            if !first {
                let (record, place) = ("second subsection of one name", "in the configuration");
                return Err(Violation::Misplaced { record, place }.at(at));
            }
        }
        Ok(configuration)
    }

    fn decode_capabilities<R: Read>(&mut self, r: &mut Reader<R>) -> Result<(), Error> {
        let count = r.u32("number of capabilities")?;
        if count > limits::CAPABILITIES {
            let max = limits::CAPABILITIES.into();
            return Err(Malformed::too_long("number of capabilities", max, count.into()).at(r.place()));
        }
        for _ in 0..count {
            let at = r.here();
            let name = r.section_name("name of a capability")?;
            match name.as_bytes() {
                known if known == IGNORE_SHARED.as_bytes() => self.ignore_shared = true,
                known if known == MAPPED_RAM.as_bytes() => self.mapped_ram = true,
                _ => {
                    let found = name.to_string();
                    return Err(Malformed::Name { field: "capability", found }.at(at));
                }
            }
        }
        Ok(())
    }
}

/// Appends the file header, with the configuration if there is one.
pub fn encode_header(configuration: Option<&Configuration>, out: &mut Vec<u8>) {
    out.put_u32(MAGIC);
    out.put_u32(VERSION);
    if let Some(configuration) = configuration {
        configuration.encode(out);
    }
}

/// Decodes the file header; `None` if no configuration follows, as with machine types up to 2.3.
///
/// # Errors
/// If the stream is not QEMU's, has another version, or the configuration is refused.
pub fn decode_header<R: Read>(r: &mut Reader<R>) -> Result<Option<Configuration>, Error> {
    match decode_header_of_file(r)? {
        (false, configuration) => Ok(configuration),
        (true, _) => Err(Unsupported::Delta.at(r.place())),
    }
}

/// Decodes the header of a file; `true` if it is a delta.
///
/// # Errors
/// As [`decode_header`].
pub(crate) fn decode_header_of_file<R: Read>(
    r: &mut Reader<R>,
) -> Result<(bool, Option<Configuration>), Error> {
    let other = other_format(r)?;
    let magic = r.u32("magic")?;
    if magic != MAGIC {
        return Err(match other {
            Some(other) => Unsupported::OtherFormat(other).at(r.place()),
            None => Malformed::value("magic", "0x5145564d (\"QEVM\")", magic).at(r.place()),
        });
    }
    let version = r.u32("version")?;
    let is_delta = match version {
        VERSION => false,
        DELTA_VERSION => true,
        _ => return Err(Unsupported::Version(version).at(r.place())),
    };
    let configuration = match r.peek()? {
        Some(CONFIGURATION) => Some(Configuration::decode(r)?),
        _ => None,
    };
    Ok((is_delta, configuration))
}

/// The format of a stream that is not QEMU's. Waits for the rest of a head only if its beginning is known.
fn other_format<R: Read>(r: &mut Reader<R>) -> Result<Option<OtherFormat>, Error> {
    let Some(other) = OtherFormat::of(r.arrived()?) else { return Ok(None) };
    Ok(match other {
        OtherFormat::LibvirtSave { .. } => {
            r.peek_bytes(OtherFormat::HEAD)?.map_or(Some(other), OtherFormat::of)
        }
        other => Some(other),
    })
}

fn put_subsection(out: &mut Vec<u8>, name: &'static str) {
    out.put_u8(SUBSECTION);
    put_text(out, name);
    out.put_u32(SUBSECTION_VERSION);
}

fn put_text(out: &mut Vec<u8>, name: &'static str) {
    if let Some(name) = SectionName::new(name) {
        out.put_name(name.as_name());
    }
}

#[cfg(test)]
mod tests;
