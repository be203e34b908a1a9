//! Devices that are sent before the end of RAM, whose end nothing marks either.
//!
//! ```text
//! START ram … footer ─ 04 id name instance version body 7e id ─ … ─ PART ram
//! ```
//!
//! The description that tells their lengths comes at the end of the stream, and RAM cannot wait for it. So a body
//! ends at the first footer of its section behind which something stands that can follow one. Device data may
//! look so by chance or by malice; then the description, whose first devices these are, fails to fit at the end,
//! and the whole stream is refused. Until then only RAM of the same machine was written.

use std::io::Read;

use super::DeviceSection;
use crate::{
    error::{Error, Malformed, Unsupported},
    format::{Reader, Section, SectionHead, SectionId, encode_footer, limits},
};

const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;
/// Type and id: of a footer, and the least that follows one.
const HEAD: usize = 5;

/// The devices that came before the end of RAM, in the order of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlyPart {
    pub(super) bytes: Vec<u8>,
    pub(super) sections: Vec<DeviceSection>,
}

impl EarlyPart {
    /// The sections as they stand in the stream.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the section whose head has just been read. `ram` is the RAM section's number, if it has begun.
    ///
    /// # Errors
    /// If no end is found in as many bytes as such devices may have, or the stream has no footers.
    pub fn take<R: Read>(
        &mut self,
        r: &mut Reader<R>,
        head: &SectionHead,
        ram: Option<SectionId>,
        footers: bool,
    ) -> Result<(), Error> {
        let at = r.here();
        if !footers {
            return Err(Unsupported::EarlyDevice { name: head.name.clone() }.at(at));
        }
        Section::Full(head.clone()).encode(&mut self.bytes);
        let from = self.bytes.len();
        let mut footer = Vec::with_capacity(HEAD);
        encode_footer(head.id, &mut footer);
        loop {
            let arrived = r.arrived()?;
            let ordinary = arrived.iter().position(|byte| *byte == FOOTER).unwrap_or(arrived.len());
            if arrived.is_empty() {
                return Err(r.cut("the end of a device sent before ram"));
            }
            self.bytes.extend_from_slice(&arrived[..ordinary]);
            r.consume(ordinary);
            if self.bytes.len() > limits::EARLY_PART {
                let (max, met) = (limits::EARLY_PART as u64, self.bytes.len() as u64);
                return Err(Malformed::too_long("devices sent before ram", max, met).at(at));
            }
            if ordinary > 0 {
                continue;
            }
            if r.look(HEAD)?.is_some_and(|bytes| bytes == footer) && follows_footer(r, ram)? {
                break;
            }
            self.bytes.push(FOOTER);
            r.consume(1);
        }
        let body = from..self.bytes.len();
        self.bytes.extend_from_slice(&footer);
        r.consume(HEAD);
        let SectionHead { id, name, instance, version } = head.clone();
        self.sections.push(DeviceSection { name, instance, version, id, body, early: true });
        Ok(())
    }
}

/// Whether behind the footer that comes next stands what may follow a device before the end of RAM.
fn follows_footer<R: Read>(r: &mut Reader<R>, ram: Option<SectionId>) -> Result<bool, Error> {
    let Some(&[kind, a, b, c, d]) = r.look(2 * HEAD)?.and_then(|bytes| bytes.get(HEAD..)) else {
        return Ok(false);
    };
    match kind {
        PART | END => Ok(ram == Some(SectionId(u32::from_be_bytes([a, b, c, d])))),
        // Number and length; what is not served is refused by name when it is read.
        COMMAND => Ok(a == 0 && (1..=11).contains(&b)),
        START | FULL => {
            let length = r.look(2 * HEAD + 1)?.and_then(|bytes| bytes.last().copied()).unwrap_or_default();
            let name = r.look(2 * HEAD + 1 + usize::from(length))?;
            let name = name.and_then(|bytes| bytes.get(2 * HEAD + 1..)).unwrap_or_default();
            Ok(!name.is_empty() && name.iter().all(|byte| (b' '..=b'~').contains(byte)))
        }
        _ => Ok(false),
    }
}
