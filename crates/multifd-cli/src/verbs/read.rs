//! `multifd read`: guest-physical memory as a table, or as it is.
//!
//! ```text
//! 00000000000f6b40  5f 53 4d 33 5f 1c 18 03  00 00 01 00 45 00 00 00  |_SM3_.......E...|
//! *                 lines that are equal to the one before
//! ```

use std::{fmt::Write as _, io::Write as _};

use multifd::channel::Stop;
use qemu_stream::physical::PhysicalAddress;

use super::memory::Memory;
use crate::{
    args::ReadArgs,
    output::{
        outcome::{Failure, While},
        outlet::{self, print_lines},
    },
};

pub(crate) fn run(args: &ReadArgs) -> Result<(), Failure> {
    let stop = Stop::new();
    let Memory { memory, .. } = Memory::open(&args.file, &args.physical, true, &stop)?;
    let end = args.gpa.0.checked_add(args.len);
    let end = end.ok_or_else(|| {
        Failure::Usage(format!("{} and {} bytes exceed 64 bits", args.gpa, args.len).into())
    })?;
    let failed = |error| -> Failure {
        let ranges: Vec<_> = memory
            .map()
            .ranges()
            .iter()
            .map(|range| format!("{} to {}", range.start, range.last()))
            .collect();
        let doing =
            format!("cannot read {} bytes at {}; RAM is at {}", args.len, args.gpa, ranges.join(", "));
        While::new(doing, error).into()
    };
    let mut table = Table::default();
    let mut out = if args.raw { Some(outlet::bytes().map_err(failed)?) } else { None };
    let mut buffer = vec![0; PIECE];
    let mut at = args.gpa.0;
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        let Some(piece) = buffer.get_mut(..length) else { break };
        memory.read(PhysicalAddress(at), piece).map_err(failed)?;
        match &mut out {
            Some(out) => match out.write_all(piece) {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                written => written.map_err(failed)?,
            },
            None => print_lines(&table.lines(at, piece))?,
        }
        at += length as u64;
    }
    match out {
        Some(mut out) => out.flush().map_err(failed),
        None => Ok(print_lines(&[format!("{end:016x}")])?),
    }
}

/// Lines of a table, in which lines that are equal to the one before are left out.
#[derive(Default)]
struct Table {
    last: Option<Vec<u8>>,
    leaves_out: bool,
}

impl Table {
    fn lines(&mut self, at: u64, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for (start, row) in (at..).step_by(ROW).zip(bytes.chunks(ROW)) {
            if self.last.as_deref() == Some(row) {
                if !self.leaves_out {
                    lines.push("*".to_owned());
                }
                self.leaves_out = true;
            } else {
                lines.push(line(start, row));
                (self.last, self.leaves_out) = (Some(row.to_vec()), false);
            }
        }
        lines
    }
}

/// A line of the table.
pub(super) fn line(start: u64, row: &[u8]) -> String {
    let mut text = format!("{start:016x} ");
    for column in 0..ROW {
        let gap = if column % 8 == 0 { " " } else { "" };
        let _ = match row.get(column) {
            Some(byte) => write!(text, "{gap}{byte:02x} "),
            None => write!(text, "{gap}   "),
        };
    }
    let printed = row.iter().map(|byte| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' });
    format!("{text} |{}|", printed.collect::<String>())
}

/// Bytes in a line.
const ROW: usize = 16;
/// Bytes that are read at once: a multiple of a line.
const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lines_are_left_out_over_the_border_of_pieces() {
        let mut table = Table::default();
        let mut lines = table.lines(0x10, &[0; 48]);
        lines.extend(table.lines(0x40, &[[0; 16], *b"abc\x7f\x1b[2J........"].concat()));
        lines.extend(table.lines(0x60, b"end"));
        assert_eq!(
            lines,
            [
                "0000000000000010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
                "*",
                "0000000000000050  61 62 63 7f 1b 5b 32 4a  2e 2e 2e 2e 2e 2e 2e 2e  |abc..[2J........|",
                "0000000000000060  65 6e 64                                          |end|",
            ]
        );
    }
}
