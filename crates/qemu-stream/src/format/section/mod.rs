//! The data between two bodies: the heads of sections, footers, the end.
//!
//! ```text
//! 01 START, 04 FULL | u32 id | counted name | u32 instance | u32 version | body | footer
//! 02 PART,  03 END  | u32 id | body | footer
//! 06 VMDESCRIPTION  | u32 length | JSON           08 COMMAND | see command/
//! 00 EOF                                          7e footer  | u32 id
//! ```

use std::io::Read;

use super::{Command, Put, Reader, SectionName, section_id::SectionId};
use crate::error::{Error, Malformed, Place, Violation};

const EOF: u8 = 0x00;
const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const VMDESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

/// The head of a START or FULL section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionHead {
    /// Its number.
    pub id: SectionId,
    /// Its name.
    pub name: SectionName,
    /// The number that distinguishes sections with this name.
    pub instance: u32,
    /// The version of its body.
    pub version: u32,
}

/// An item between two bodies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section {
    /// No section follows.
    Eof,
    /// The first section of a part that is sent in pieces.
    Start(SectionHead),
    /// A further piece.
    Part(SectionId),
    /// The last piece.
    End(SectionId),
    /// A device, sent at once.
    Full(SectionHead),
    /// The JSON that describes the devices; this number of bytes follows.
    VmDescription(u32),
    /// A command.
    Command(Command),
}

impl Section {
    /// The name of its type.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Eof => "EOF",
            Self::Start(_) => "START",
            Self::Part(_) => "PART",
            Self::End(_) => "END",
            Self::Full(_) => "FULL",
            Self::VmDescription(_) => "VMDESCRIPTION",
            Self::Command(command) => command.name(),
        }
    }

    /// Appends the head.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Eof => out.put_u8(EOF),
            Self::Start(head) => head.encode(START, out),
            Self::Full(head) => head.encode(FULL, out),
            Self::Part(id) => {
                out.put_u8(PART);
                out.put_u32(id.0);
            }
            Self::End(id) => {
                out.put_u8(END);
                out.put_u32(id.0);
            }
            Self::VmDescription(length) => {
                out.put_u8(VMDESCRIPTION);
                out.put_u32(*length);
            }
            Self::Command(command) => {
                out.put_u8(COMMAND);
                command.encode(out);
            }
        }
    }

    /// Decodes the next head.
    ///
    /// # Errors
    /// If the type is unknown or not allowed between sections, or the stream ends.
    pub fn decode<R: Read>(r: &mut Reader<R>) -> Result<Self, Error> {
        let kind = r.u8("a section")?;
        let misplaced = |record| Violation::Misplaced { record, place: "between sections" };
        match kind {
            EOF => Ok(Self::Eof),
            START => SectionHead::decode(r).map(Self::Start),
            PART => Ok(Self::Part(SectionId(r.u32("section id")?))),
            END => Ok(Self::End(SectionId(r.u32("section id")?))),
            FULL => SectionHead::decode(r).map(Self::Full),
            VMDESCRIPTION => Ok(Self::VmDescription(r.u32("length of the description")?)),
            COMMAND => Command::decode(r).map(Self::Command),
            SUBSECTION => Err(misplaced("SUBSECTION").at(r.place())),
            CONFIGURATION => Err(misplaced("CONFIGURATION").at(r.place())),
            FOOTER => Err(misplaced("FOOTER").at(r.place())),
            unknown => Err(Malformed::value("section type", "0x0 to 0x8", unknown).at(r.place())),
        }
    }
}

impl SectionHead {
    /// The version of the RAM section's body.
    pub(crate) const RAM_VERSION: u32 = 4;

    /// The head of the RAM section's START.
    pub(crate) fn ram(id: SectionId) -> Self {
        Self { id, name: SectionName::ram(), instance: 0, version: Self::RAM_VERSION }
    }

    /// Whether this is the RAM section.
    pub(crate) fn is_ram(&self) -> bool {
        self.name == SectionName::ram()
    }

    /// Refuses a RAM section with a different instance or version; `at` is the place of its head.
    pub(crate) fn check_ram(&self, at: Place) -> Result<(), Error> {
        if self.version != Self::RAM_VERSION {
            return Err(Malformed::value("version of section \"ram\"", "4", self.version).at(at));
        }
        if self.instance != 0 {
            return Err(Malformed::value("instance of section \"ram\"", "0", self.instance).at(at));
        }
        Ok(())
    }

    fn encode(&self, kind: u8, out: &mut Vec<u8>) {
        out.put_u8(kind);
        out.put_u32(self.id.0);
        out.put_name(self.name.as_name());
        out.put_u32(self.instance);
        out.put_u32(self.version);
    }

    fn decode<R: Read>(r: &mut Reader<R>) -> Result<Self, Error> {
        Ok(Self {
            id: SectionId(r.u32("section id")?),
            name: r.section_name("name of a section")?,
            instance: r.u32("instance id")?,
            version: r.u32("version of a section")?,
        })
    }
}

/// Appends the footer of section `id`.
pub fn encode_footer(id: SectionId, out: &mut Vec<u8>) {
    out.put_u8(FOOTER);
    out.put_u32(id.0);
}

/// Decodes the footer that must close section `id`.
///
/// # Errors
/// If something else follows, or it closes another section.
pub fn decode_footer<R: Read>(id: SectionId, r: &mut Reader<R>) -> Result<(), Error> {
    let kind = r.u8("a footer")?;
    if kind != FOOTER {
        return Err(Violation::NoFooter { section: id, found: kind }.at(r.place()));
    }
    let found = SectionId(r.u32("section id of a footer")?);
    if found != id {
        return Err(Violation::Footer { expected: id, found }.at(r.place()));
    }
    Ok(())
}

/// Whether a footer follows. No section begins with its byte.
///
/// # Errors
/// If the system cannot read.
pub fn footer_follows<R: Read>(r: &mut Reader<R>) -> Result<bool, Error> {
    Ok(r.peek()? == Some(FOOTER))
}

#[cfg(test)]
mod tests;
