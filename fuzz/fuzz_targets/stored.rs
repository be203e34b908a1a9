//! A stream in a file, made a mapped-ram file and opened; and the head of a libvirt image. What was opened keeps its blocks and devices.
#![no_main]

use std::{
    os::unix::fs::FileExt,
    sync::{Arc, atomic::AtomicU64},
};

use multifd::channel::Stop;
use multifd_fuzz::shown;
use qemu_stream::{
    mapped_ram::ReadPath,
    stored::{LibvirtImage, Pages, Unfold},
};

multifd_fuzz::target!(|bytes: &[u8]| {
    let file = multifd_fuzz::file();
    if file.write_all_at(bytes, 0).is_ok()
        && let Ok(Some(image)) = LibvirtImage::read(&file, 0)
    {
        assert!(image.xml.len() <= 3 * LibvirtImage::MOST_XML);
    }
    for pages in [Pages::Keep, Pages::Count] {
        let scratch = Arc::new(multifd_fuzz::file());
        let unfolded = Unfold::new(bytes).pages(pages).run(&scratch, &AtomicU64::new(0), &Stop::new());
        if let Some(machine) = shown(unfolded) {
            for (index, _) in machine.blocks().iter() {
                shown(machine.bitmap(index));
            }
            assert_eq!(shown(machine.ram_blocks(|_, _| ReadPath::Cached)).is_some(), pages == Pages::Keep);
        }
    }
});
