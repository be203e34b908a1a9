//! A mapped-ram file: read whole or refused. The last byte of the input says how long a hole the file has in it, and where.
#![no_main]

use multifd_fuzz::{shown, write_sparse};
use qemu_stream::mapped_ram::{MappedRamFile, ReadPath};

multifd_fuzz::target!(|bytes: &[u8]| {
    let file = multifd_fuzz::file();
    write_sparse(bytes, &file);
    if let Some(file) = shown(MappedRamFile::open(file, 0)) {
        for (index, _) in file.blocks().iter() {
            shown(file.bitmap(index));
        }
        shown(file.ram_blocks(|_, _| ReadPath::Cached));
    }
});
