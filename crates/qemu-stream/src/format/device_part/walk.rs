//! Splits the device part by its description.

use super::{
    DeviceSection, EarlyPart,
    description::{Description, Entry},
    misfit::Misfit,
};
use crate::{
    error::StreamKind,
    format::{Reader, Section, SectionHead, decode_footer},
};

/// Splits the sections of `early`, which arrived before the end of RAM and are described first, and of `blob`, which
/// ends before EOF. All of both must be used. Live sections are not described: those in `early` are known, and those in
/// `blob` are at its beginning.
pub(super) fn split(
    early: &EarlyPart,
    blob: &[u8],
    description: &Description,
    footers: bool,
) -> Result<Vec<DeviceSection>, Misfit> {
    let mut entries = description.devices.iter();
    let mut sections = Vec::new();
    let end = early.bytes.len();
    let mut at = early.behind_live(0);
    while at < end
        && let Some(entry) = entries.next()
    {
        at = early.behind_live(take(&early.bytes, at, entry, footers, true, &mut sections)?);
    }
    if at < end {
        return Err(Misfit::Left { left: end - at });
    }
    at = early.ends.len();
    for entry in entries {
        at = take(blob, at, entry, footers, false, &mut sections)?;
    }
    match blob.len() - at {
        0 => Ok(sections),
        left => Err(Misfit::Left { left }),
    }
}

/// Checks the section at `at`, which must be the described one. Returns its end.
fn take(
    blob: &[u8],
    mut at: usize,
    entry: &Entry,
    footers: bool,
    early: bool,
    sections: &mut Vec<DeviceSection>,
) -> Result<usize, Misfit> {
    let other = || Misfit::Device { at, name: entry.name.clone().into(), instance: entry.instance };
    let (head, length) = blob.get(at..).and_then(head_at).ok_or_else(other)?;
    // JSON shows an instance above 2^31 as a negative number: both mean the same 32 bits.
    if head.name.as_bytes() != entry.name.as_bytes()
        || i64::from(head.instance) != entry.instance.rem_euclid(1 << 32)
    {
        return Err(other());
    }
    let from = at + length;
    let beyond = || Misfit::Beyond { at: from, name: head.name.clone() };
    let length = entry.length.ok_or_else(beyond)?;
    let to = usize::try_from(length).ok().and_then(|length| from.checked_add(length));
    let to = to.filter(|to| *to <= blob.len()).ok_or_else(beyond)?;
    at = to;
    if footers {
        let mut r = Reader::with_capacity(blob.get(to..).unwrap_or_default(), StreamKind::Main, HEAD);
        decode_footer(head.id, &mut r).map_err(|_| Misfit::Footer {
            at: to,
            name: head.name.clone(),
            length,
        })?;
        at += FOOTER;
    }
    let SectionHead { id, name, instance, version } = head;
    sections.push(DeviceSection { name, instance, version, id, body: from..to, early });
    Ok(at)
}

/// The head of the FULL section at the beginning of `blob`, and its length.
pub(super) fn head_at(blob: &[u8]) -> Option<(SectionHead, usize)> {
    let mut r = Reader::with_capacity(blob, StreamKind::Main, HEAD);
    match Section::decode(&mut r).ok()? {
        Section::Full(head) => Some((head, usize::try_from(r.position()).ok()?)),
        _ => None,
    }
}

/// Above the longest head: type, id, name, instance, version.
pub(super) const HEAD: usize = 512;
const FOOTER: usize = 5;
