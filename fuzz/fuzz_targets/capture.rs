//! The main stream of a source with multifd off, into a mapped-ram file of any announced length, which is read again.
#![no_main]

use std::{cell::RefCell, sync::Arc, time::Duration};

use multifd::{Error, ReceiveOptions, Receiver, channel::Stop};
use multifd_fuzz::{Source, shown};
use qemu_stream::{
    format::SectionId,
    incoming::{Expected, Incoming, LeftOut, Loader},
    mapped_ram::{Layout, MappedRamFile, Shape, Tail},
};

multifd_fuzz::target!(|bytes: &[u8]| {
    let options = ReceiveOptions::new().channels_timeout(Duration::from_millis(1));
    let receiver = Receiver::new(options, Stop::new());
    let file = Arc::new(multifd_fuzz::file());
    let layout = RefCell::new(None);
    let mut loader = Loader::new(&receiver, Expected::AnyMachine, |configuration, list| {
        let (section, ignored) = (SectionId(1), &[][..]);
        let shape = Shape { configuration, section, offset: 0, footers: true, ignored, sync_mode: None };
        let made = Layout::of(&shape, list).map_err(|error| Error::other("lay the file out", error))?;
        file.set_len(made.tail_offset()).map_err(|error| Error::io("make the file longer", error))?;
        let blocks = made.ram_blocks(&file, None);
        *layout.borrow_mut() = Some(made);
        blocks
    })
    .left_out(LeftOut::Pages);
    let read = Incoming::new(Source::new(bytes)).suppress_vmdesc(true).run(&mut loader);
    let Some(loaded) = shown(read) else { return };
    let Some(blocks) = shown(loader.finish(&loaded)) else { return };
    let Some(layout) = layout.into_inner() else { return };
    // A walk over the words of terabytes takes longer than a fuzzer has patience.
    if layout.blocks().total() > 1 << 40 {
        return;
    }
    let tail =
        Tail { switchover_start: loaded.switchover_start, devices: &loaded.devices, about: None, base: None };
    if shown(layout.write_around(&file, &blocks, &tail)).is_some() {
        let read = MappedRamFile::open(file.try_clone().expect("the same file"), 0)
            .expect("what was written is read");
        for (index, _) in read.blocks().iter() {
            shown(read.bitmap(index));
        }
    }
});
