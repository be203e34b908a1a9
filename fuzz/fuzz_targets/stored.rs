//! A stream in a file, made a mapped-ram file and opened; its devices field by field, its memory by addresses. And the head of a
//! libvirt image.
#![no_main]

use std::{
    os::unix::fs::FileExt,
    sync::{Arc, atomic::AtomicU64},
};

use multifd::{channel::Stop, ram::runs};
use multifd_fuzz::shown;
use qemu_stream::{
    mapped_ram::{ReadPath, StoredMachine},
    physical::{PhysicalMap, PhysicalMemory},
    state::{Devices, Fields, Value},
    stored::{LibvirtImage, Pages, Unfold},
};

/// Decodes every field, and the first elements of each array; the number of bytes that they have.
fn walk(fields: Fields<'_>) -> usize {
    let value = |value: Value<'_>| match value {
        Value::Struct(fields) => {
            walk(fields);
        }
        Value::Array(array) => {
            for element in array.iter().take(ELEMENTS) {
                if let Value::Struct(fields) = element {
                    walk(fields);
                }
            }
        }
        _ => {}
    };
    let mut length = 0;
    for field in fields {
        length += field.bytes().len();
        value(field.value());
    }
    length
}

fn look(machine: &StoredMachine) {
    if let Some(devices) = shown(Devices::of(machine.devices())) {
        for device in devices.iter() {
            // The heads of subsections are not in a field.
            assert!(walk(device.fields()) <= device.bytes().len());
        }
    }
    let Some(map) = shown(PhysicalMap::of(machine, &[])) else { return };
    let memory = shown(PhysicalMemory::new(machine, map)).expect("its pages were kept");
    for range in memory.map().ranges() {
        let mut all = [0; 64];
        shown(memory.read(range.start, &mut all));
        for piece in memory.present(range, 1 << 20).take(ELEMENTS) {
            assert!(piece.start >= range.start && piece.last() <= range.last());
            let length = usize::try_from(piece.length.min(1 << 16)).expect("small");
            shown(memory.read(piece.start, &mut vec![0; length])).expect("RAM that is present");
        }
    }
}

/// Compares the first pages that are present.
fn same(copied: &StoredMachine, left: &StoredMachine) {
    look(left);
    let [copied, left] =
        [copied, left].map(|machine| machine.ram_blocks(|_, _| ReadPath::Cached).expect("blocks"));
    for ((_, copied), (_, left)) in copied.iter().zip(left.iter()) {
        let present: Vec<_> = copied.present_words().take(ELEMENTS).collect();
        assert_eq!(present, left.present_words().take(ELEMENTS).collect::<Vec<_>>());
        let words = present.iter().enumerate();
        for (page, _) in words.flat_map(|(word, bits)| runs(word, *bits)).take(ELEMENTS) {
            let [copied, left] = [copied, left].map(|block| {
                let mut bytes = vec![0; block.page_size().bytes()];
                block.load(page, &mut bytes).expect("read");
                bytes
            });
            assert!(copied == left);
        }
    }
}

multifd_fuzz::target!(|bytes: &[u8]| {
    let file = multifd_fuzz::file();
    if file.write_all_at(bytes, 0).is_ok()
        && let Ok(Some(image)) = LibvirtImage::read(&file, 0)
    {
        // Every byte that is no text becomes three.
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
            if pages == Pages::Keep {
                look(&machine);
                let scratch = Arc::new(multifd_fuzz::file());
                let left = Unfold::in_file(Arc::new(file.try_clone().expect("open")), 0).expect("a file");
                let left = shown(left.run(&scratch, &AtomicU64::new(0), &Stop::new()));
                same(&machine, &left.expect("it was a machine when it was copied"));
            }
        }
    }
});

const ELEMENTS: usize = 64;
