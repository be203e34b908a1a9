//! A mapped-ram file: read whole or refused. The last byte of the input says how long a hole the file has in it, and where.
#![no_main]

use std::{fs::File, io::Write, os::unix::fs::FileExt};

use multifd_fuzz::shown;
use qemu_stream::mapped_ram::{MappedRamFile, ReadPath};

multifd_fuzz::target!(|bytes: &[u8]| {
    if let Some(file) = shown(MappedRamFile::open(sparse(bytes), 0)) {
        for (index, _) in file.blocks().iter() {
            shown(file.bitmap(index));
        }
        let _ = file.ram_blocks(|_, _| ReadPath::Cached);
    }
});

/// The input as a file. If its last byte is not 0, what is behind the first mark of the input, such as the end of a machine,
/// is 2^n MiB further back: RAM of terabytes needs a hole of that length for its pages.
fn sparse(bytes: &[u8]) -> File {
    let mut file = multifd_fuzz::file();
    let hole = bytes.last().map_or(0, |byte| u32::from(byte % 27));
    let mark = bytes.windows(MARK.len()).position(|at| at == MARK).filter(|_| hole > 0);
    let (head, tail) = bytes.split_at(mark.unwrap_or(bytes.len()));
    file.write_all(head).expect("written");
    if let Some(tail) = tail.get(MARK.len()..) {
        file.write_all_at(tail, 1 << (20 + hole)).expect("written");
    }
    file
}

const MARK: &[u8] = b"~~hole~~";
