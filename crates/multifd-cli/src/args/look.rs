//! The command lines of `multifd read`, `find`, `export` and `diff`.

use std::{num::NonZero, path::PathBuf};

use clap::{
    Args as ClapArgs, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use qemu_stream::physical::PhysicalAddress;

use super::{
    physical::{PhysicalArgs, address, bytes},
    shared::file_address,
};
use crate::file_address::{FileAddress, file_path};

#[derive(Debug, ClapArgs)]
pub(crate) struct ReadArgs {
    /// First guest-physical address to read: hexadecimal with 0x, or decimal; 4K is 4096
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(crate) gpa: PhysicalAddress,
    /// Number of bytes to read
    #[arg(long, value_name = "LENGTH", default_value = "256", value_parser = bytes)]
    pub(crate) len: u64,
    /// Write the bytes as they are, not as a table
    #[arg(long)]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) physical: PhysicalArgs,
    /// File to read: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
}

#[derive(Debug, ClapArgs)]
#[group(id = "pattern", required = true, multiple = false, args = ["hex", "text"])]
pub(crate) struct FindArgs {
    /// Bytes to find, as hexadecimal digits: "7f 45 4c 46"
    #[arg(long, value_name = "BYTES", value_parser = hex)]
    pub(crate) hex: Option<Pattern>,
    /// Text to find, in UTF-8
    #[arg(long, value_name = "TEXT", value_parser = text)]
    pub(crate) text: Option<Pattern>,
    /// End after this number of places; 0 = no limit
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub(crate) limit: u64,
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub(crate) json: bool,
    /// Number of threads; default: one for each processor
    #[arg(long, value_name = "NUMBER")]
    pub(crate) threads: Option<NonZero<u8>>,
    #[command(flatten)]
    pub(crate) physical: PhysicalArgs,
    /// File to read: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
}

impl FindArgs {
    /// The bytes to find, at least one.
    pub(crate) fn pattern(&self) -> &[u8] {
        let pattern = self.hex.as_ref().or(self.text.as_ref());
        pattern.map_or(&[], |pattern| &pattern.0)
    }
}

/// Bytes to find: never empty, and at most [`MOST`].
#[derive(Clone, Debug)]
pub(crate) struct Pattern(Vec<u8>);

impl Pattern {
    fn new(bytes: Vec<u8>) -> Result<Self, String> {
        match bytes.len() {
            1..=MOST => Ok(Self(bytes)),
            length => Err(format!("expected 1 to {MOST} bytes, found {length}")),
        }
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ExportArgs {
    /// Format of OUT
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: FormatArg,
    /// Replace OUT if it exists. WARNING: the old data is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Print errors only
    #[arg(long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) physical: PhysicalArgs,
    /// File to read: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// File for the memory, readable by its owner only; - = standard output
    #[arg(value_parser = out_path())]
    pub(crate) out: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DiffArgs {
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub(crate) json: bool,
    /// Show this number of runs of pages of each block; 0 = all
    #[arg(long, value_name = "NUMBER", default_value_t = 20)]
    pub(crate) runs: usize,
    /// Number of threads; default: one for each processor
    #[arg(long, value_name = "NUMBER")]
    pub(crate) threads: Option<NonZero<u8>>,
    /// Read files although they are damaged: do not compare them with their digests
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// One file: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) a: FileAddress,
    /// The other file: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) b: FileAddress,
}

/// A format that other tools read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// ELF core file with the registers of the processors: gdb, crash, drgn, volatility3
    Elf,
    /// LiME: volatility3
    Lime,
    /// The address space from 0 on; what is not RAM is zero
    Raw,
    /// kdump (diskdump), not compressed: crash, drgn
    Kdump,
}

fn hex(text: &str) -> Result<Pattern, String> {
    let expected = || format!("expected an even number of hexadecimal digits, found {text:?}");
    let digits: Option<Vec<_>> =
        text.chars().filter(|digit| !digit.is_whitespace()).map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2)).ok_or_else(expected)?;
    let bytes = digits.chunks_exact(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit));
    Pattern::new(bytes.filter_map(|byte: u32| u8::try_from(byte).ok()).collect())
}

fn text(text: &str) -> Result<Pattern, String> {
    Pattern::new(text.as_bytes().to_vec())
}

fn out_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(file_path)
}

/// Bytes of a pattern: less than the pieces in which memory is searched.
const MOST: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_from_digits() {
        assert_eq!(hex("7f 45\t4C46").expect("digits").0, [0x7f, 0x45, 0x4c, 0x46]);
        for wrong in ["", " ", "7", "7f4", "0x7f", "7g", "é"] {
            assert!(hex(wrong).is_err(), "{wrong}");
        }
        assert!(text("").is_err() && text(&"x".repeat(MOST + 1)).is_err());
    }
}
