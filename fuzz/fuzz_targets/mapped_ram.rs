//! A mapped-ram file: read whole or refused.
#![no_main]

use std::io::Write;

use multifd_fuzz::shown;
use qemu_stream::mapped_ram::MappedRamFile;

multifd_fuzz::target!(|bytes: &[u8]| {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("written");
    if let Some(file) = shown(MappedRamFile::open(file, 0)) {
        for (index, _) in file.blocks().iter() {
            shown(file.bitmap(index));
        }
    }
});
