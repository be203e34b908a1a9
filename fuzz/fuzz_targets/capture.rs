//! The main stream of a source with multifd off, into a mapped-ram file of any announced length, which is read again.
#![no_main]

use std::{
    cell::RefCell,
    io::{Cursor, Read, Write},
    sync::Arc,
    time::Duration,
};

use multifd::{
    Error, ReceiveOptions, Receiver,
    channel::{Stop, Wake},
};
use qemu_stream::{
    Connection,
    format::SectionId,
    incoming::{Expected, Incoming, LeftOut, Loader},
    mapped_ram::{Layout, MappedRamFile, Shape, Tail},
};

/// Gives the input, takes whatever is answered.
struct Source<'a>(Cursor<&'a [u8]>);

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Source<'_> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        Ok(buffer.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Nothing here waits for a peer.
impl Connection for Source<'_> {
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn set_read_timeout(&mut self, _: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
}

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
    let Ok(loaded) = Incoming::new(Source(Cursor::new(bytes))).suppress_vmdesc(true).run(&mut loader) else {
        return;
    };
    let Ok(blocks) = loader.finish(&loaded) else { return };
    let Some(layout) = layout.into_inner() else { return };
    // A walk over the words of terabytes takes longer than a fuzzer has patience.
    if layout.blocks().total() > 1 << 40 {
        return;
    }
    let tail = Tail { switchover_start: loaded.switchover_start, devices: &loaded.devices };
    if layout.write_around(&file, &blocks, &tail).is_ok() {
        let read = MappedRamFile::open(file.try_clone().expect("the same file"), 0)
            .expect("what was written is read");
        for (index, _) in read.blocks().iter() {
            let _ = read.bitmap(index);
        }
    }
});
