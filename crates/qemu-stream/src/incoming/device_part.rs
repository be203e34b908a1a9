//! Collects the device part until its end is found.
//!
//! The description tells it. Where none comes, it is where a source without return path closes; behind a source with
//! one only silence follows, which is believed if the caller says that no description comes.

use std::time::Duration;

use crate::{
    connection::Connection,
    error::{Error, Malformed, Unsupported},
    format::{DevicePart, EndFinder, Reader, limits},
};

/// What is known of a source that sends no description.
#[derive(Clone, Copy, Debug)]
pub(super) struct Without {
    /// It does not close behind its last byte.
    pub(super) return_path: bool,
    /// The caller says that none comes.
    pub(super) expected: bool,
    /// With a return path: a silence as long as this, behind what may be the end, is taken for it.
    pub(super) silence: Duration,
    /// What every read is held to otherwise.
    pub(super) stall: Option<Duration>,
}

/// Reads to the end of the stream, which its contents tell: a source with a return path does not close.
pub(super) fn collect<C: Connection>(
    r: &mut Reader<C>,
    mut finder: EndFinder,
    footers: bool,
    without: &Without,
) -> Result<DevicePart, Error> {
    let mut collected = finder.ends().to_vec();
    let ends = collected.len();
    loop {
        let at = r.here();
        let may_have_ended = without.return_path && finder.may_have_ended(&collected);
        let limit = may_have_ended.then_some(without.silence);
        if limit.is_some() {
            set_limit(r, limit)?;
        }
        let arrived = match r.arrived() {
            Ok(arrived) => arrived,
            Err(Error::TimedOut { .. }) if limit.is_some() => {
                if without.expected && footers {
                    set_limit(r, without.stall)?;
                    return finder.without_description(collected).map_err(|what| what.at(at));
                }
                return Err(Unsupported::NoDescription { length: collected.len() as u64 }.at(at));
            }
            Err(error) => return Err(error),
        };
        let count = arrived.len();
        if count == 0 {
            // A source with a return path that closes has not waited for its answer: it is gone. Without footers,
            // most places where a stream may be cut look like its end.
            if without.return_path || !(footers || without.expected) {
                return Err(finder.missing(collected.len()).at(at));
            }
            return finder.without_description(collected).map_err(|what| what.at(at));
        }
        let devices = collected.len() - ends;
        if count > limits::DEVICE_PART - devices {
            let (max, met) = (limits::DEVICE_PART as u64, (devices + count) as u64);
            return Err(Malformed::too_long("device part", max, met).at(at));
        }
        collected.extend_from_slice(arrived);
        r.consume(count);
        if limit.is_some() {
            set_limit(r, without.stall)?;
        }
        if let Some(part) = finder.look(&mut collected).map_err(|what| what.at(at))? {
            return Ok(part);
        }
    }
}

/// How long the reads to come wait.
pub(super) fn set_limit<C: Connection>(r: &mut Reader<C>, limit: Option<Duration>) -> Result<(), Error> {
    let at = r.here();
    let set = r.get_mut().set_read_timeout(limit);
    set.map_err(|source| Error::Io { at, doing: "set a time limit", source })
}
