//! Collects the device part until its end is found.

use std::io::Read;

use crate::{
    error::{Error, Malformed},
    format::{DevicePart, EndFinder, Reader, limits},
};

/// Reads to the end of the stream, which its contents tell: a source with a return path does not close.
pub(super) fn collect<R: Read>(r: &mut Reader<R>, footers: bool) -> Result<DevicePart, Error> {
    let mut finder = EndFinder::new(footers);
    let mut collected = Vec::new();
    loop {
        let at = r.here();
        let arrived = r.arrived()?;
        let count = arrived.len();
        if count == 0 {
            return Err(finder.missing(collected.len()).at(at));
        }
        if count > limits::DEVICE_PART - collected.len() {
            let (max, met) = (limits::DEVICE_PART as u64, (collected.len() + count) as u64);
            return Err(Malformed::too_long("device part", max, met).at(at));
        }
        collected.extend_from_slice(arrived);
        r.consume(count);
        if let Some(part) = finder.look(&mut collected).map_err(|what| what.at(at))? {
            return Ok(part);
        }
    }
}
