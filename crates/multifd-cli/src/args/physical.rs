//! What the verbs that read guest-physical memory have in common.

use std::ffi::OsString;

use clap::{
    Args as ClapArgs,
    builder::{OsStringValueParser, TypedValueParser},
};
use multifd::ram::{BlockName, BlockOffset};
use parse_size::Config;
use qemu_stream::physical::{PhysicalAddress, Place};
use std::os::unix::ffi::OsStrExt;

#[derive(Debug, ClapArgs)]
pub(crate) struct PhysicalArgs {
    /// Where a block of RAM is, if it is not known: ADDRESS[:OFFSET[:LENGTH]]=BLOCK; may be repeated
    ///
    /// OFFSET and LENGTH are a piece of the block in bytes; by default all of it.
    #[arg(long = "place", value_name = "PLACE", value_parser = place_of())]
    pub(crate) places: Vec<Place>,
    /// Read FILE although it is damaged: do not compare it with its digests
    #[arg(long)]
    pub(crate) no_verify: bool,
}

/// Parses a number of bytes: hexadecimal with 0x, or decimal with QEMU's suffixes (4K is 4096).
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let parsed = match hexadecimal {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        Some(_) => None,
        None => Config::new().with_binary().parse_size(text).ok(),
    };
    parsed.ok_or_else(|| format!("expected bytes like 0x1000, 4096 or 4K, found {text:?}"))
}

/// A guest-physical address.
pub(crate) fn address(text: &str) -> Result<PhysicalAddress, String> {
    bytes(text).map(PhysicalAddress)
}

fn place_of() -> impl TypedValueParser<Value = Place> {
    OsStringValueParser::new().try_map(place)
}

fn place(text: OsString) -> Result<Place, String> {
    let expected = || format!("expected ADDRESS[:OFFSET[:LENGTH]]=BLOCK, found {text:?}");
    let at = text.as_bytes().iter().position(|byte| *byte == b'=').ok_or_else(expected)?;
    let (numbers, name) = text.as_bytes().split_at(at);
    let block = name.get(1..).and_then(BlockName::new).ok_or_else(expected)?;
    let numbers = std::str::from_utf8(numbers).map_err(|_| expected())?;
    let mut numbers = numbers.split(':');
    let start = address(numbers.next().unwrap_or_default())?;
    let offset = numbers.next().map(bytes).transpose()?.unwrap_or(0);
    let length = numbers.next().map(bytes).transpose()?;
    if numbers.next().is_some() {
        return Err(expected());
    }
    Ok(Place { start, block, offset: BlockOffset(offset), length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        let read = |text: &str| {
            let place = place(text.into()).expect(text);
            (place.start.0, place.offset.0, place.length, place.block.to_string())
        };
        assert_eq!(read("0=ram0"), (0, 0, None, "ram0".into()));
        assert_eq!(read("0x100000000:2G=a=b:c"), (1 << 32, 2 << 30, None, "a=b:c".into()));
        assert_eq!(read("4G:0:1M=x"), (1 << 32, 0, Some(1 << 20), "x".into()));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in ["", "ram0", "=ram0", "0=", "x=ram0", "0:1:2:3=ram0", "0:=ram0", "-1=ram0", "0x=ram0"] {
            assert!(place(text.into()).is_err(), "{text}");
        }
    }
}
