//! A mapped-ram file: read whole or refused. The last byte of the input says how long a hole the file has in it, and where.
//! A delta finds the same bytes as its base.
#![no_main]

use std::path::PathBuf;

use multifd_fuzz::{shown, write_sparse};
use qemu_stream::mapped_ram::{Base, Digests, FoundFile, ReadPath, StoredMachine};

fn found(bytes: &[u8]) -> FoundFile {
    let file = multifd_fuzz::file();
    write_sparse(bytes, &file);
    FoundFile { file, offset: 0, path: PathBuf::new() }
}

multifd_fuzz::target!(|bytes: &[u8]| {
    for digests in [Digests::Compare, Digests::Ignore] {
        let opened = StoredMachine::open_with(found(bytes), digests, |_, _| Ok(found(bytes)));
        if let Some(machine) = shown(opened) {
            for (index, _) in machine.blocks().iter() {
                shown(machine.bitmap(index));
            }
            shown(machine.ram_blocks(|_, _| ReadPath::Cached));
            shown(Base::new(&machine, "base"));
        }
    }
});
