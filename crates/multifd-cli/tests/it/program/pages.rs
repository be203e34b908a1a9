//! Pages of every size: a file that we send to ourselves arrives unchanged.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use multifd::ram::{BlockIndex, BlockName, PageIndex, PageSize};
use qemu_stream::{
    format::{
        BlockEntry, BlockList, Configuration, Device, DevicePart, MachineType, SectionId, SectionName,
        SyncMode,
    },
    mapped_ram::{Layout, MappedRamFile, Shape, Tail},
};

use crate::kit::{Program, feed, folder, path};

/// Pages of the first block; every third is absent.
const PAGES: u64 = 133;

/// A machine with pages of this size in two blocks, whose source was set to a sync mode other than that of its type.
fn write(at: &Path, page_size: PageSize) {
    let arm = Configuration {
        target_page_size: Some(page_size).filter(|size| *size != PageSize::KIB_4),
        ..Configuration::new(MachineType::new("virt-7.2").expect("a name"))
    };
    let entry = |name, pages| {
        BlockEntry::new(BlockName::new(name).expect("a name"), pages * page_size.bytes() as u64)
    };
    let list = vec![entry("mach-virt.ram", PAGES), entry("/rom@etc/acpi/tables", 2)];
    let blocks = BlockList::new(list, page_size).expect("a list");
    let shape = Shape {
        configuration: Some(&arm),
        section: SectionId(1),
        offset: 0,
        footers: true,
        ignored: &[],
        sync_mode: Some(SyncMode::Round),
    };
    let layout = Layout::of(&shape, &blocks).expect("a layout");
    let name = SectionName::new("cpu").expect("a name");
    let cpu = Device { name, instance: 0, version: 22, state: vec![9; 700] };
    let devices = DevicePart::build(&[cpu], 4096, SectionId(2)).expect("devices");
    let file = File::create_new(at).expect("a new file");
    let tail = Tail { switchover_start: false, devices: &devices, about: None, base: None };
    let written = layout.write(&file, &tail, |index, _| match index {
        BlockIndex(0) => vec![0x6db6_db6d_b6db_6db6, 0xb6db_6db6_db6d_b6db, 0x1b],
        _ => vec![0b10],
    });
    written.expect("write the file");
    for (block, pages) in [(0, PAGES), (1, 2)] {
        for page in 0..pages {
            let at = layout.places()[block].page_offset(PageIndex(page)).expect("a page");
            let mark = ((block as u64) << 32 | (page + 1)).to_be_bytes();
            file.write_all_at(&mark.repeat(page_size.bytes() / 8), at).expect("written");
        }
    }
}

/// Every page of a file; `None` is absent.
fn pages(file: &MappedRamFile) -> Vec<Vec<Option<Vec<u8>>>> {
    let page_size = file.blocks().page_size();
    let of_block = |index: BlockIndex| {
        let (place, bitmap) = (file.place(index).expect("there"), file.bitmap(index).expect("a bitmap"));
        let page = |page: u64| {
            bitmap.contains(PageIndex(page)).then(|| {
                let mut bytes = vec![0; page_size.bytes()];
                let at = place.page_offset(PageIndex(page)).expect("a page");
                file.file().read_exact_at(&mut bytes, at).expect("read");
                bytes
            })
        };
        (0..place.pages()).map(page).collect()
    };
    file.blocks().iter().map(|(index, _)| of_block(index)).collect()
}

#[test]
fn pages_of_every_size_go_from_file_to_file() {
    for page_size in [PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64] {
        for (channels, direct) in
            [("0", &[][..]), ("1", &[]), ("3", &[]), ("1", &["--direct-io"]), ("3", &["--direct-io"])]
        {
            let folder = folder();
            let (here, there) = (path(&folder, "here"), path(&folder, "there"));
            write(&here, page_size);
            let (receive, address) = Program::receive(direct, "tcp:127.0.0.1:0", &there);
            feed(&[&["--multifd-channels", channels], direct].concat(), &here, &address).done();
            receive.done();
            let [sent, received] = [&here, &there]
                .map(|file| MappedRamFile::open(File::open(file).expect("there"), 0).expect("a whole file"));
            assert_eq!(received.blocks(), sent.blocks());
            assert_eq!(received.configuration(), sent.configuration());
            assert_eq!(received.devices(), sent.devices());
            assert_eq!(received.sync_mode(), sent.sync_mode().filter(|_| channels != "0"));
            let found = pages(&received);
            assert!(found == pages(&sent), "{page_size}, {channels} channels");
            assert_eq!(found[0].iter().flatten().count(), 89, "the bits set");
        }
    }
}
