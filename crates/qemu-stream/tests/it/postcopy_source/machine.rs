//! Machines in files, for a source of post-copy.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use multifd::ram::{BlockIndex, BlockName, PageBitmap, PageIndex, PageSize};
use qemu_stream::{
    format::{BlockEntry, BlockList, SectionId},
    mapped_ram::{Layout, MappedRamFile, ReadPath, Shape, Tail},
    outgoing::postcopy::{PostcopyOptions, PostcopySource},
};

use crate::kit::{devices, q35};

/// A machine in a file.
pub(super) struct Machine {
    pub(super) file: MappedRamFile,
}

/// A machine of 10.0 with these blocks: name, pages. Two of three pages have contents.
pub(super) fn machine(blocks: &[(&str, u64)]) -> Machine {
    of_file(tempfile::tempfile().unwrap(), blocks, &[], true)
}

/// A machine whose pages are all zero.
pub(super) fn empty(blocks: &[(&str, u64)]) -> Machine {
    of_file(tempfile::tempfile().unwrap(), blocks, &[], false)
}

/// A machine whose block with this index is shared with the destination and not in the file.
pub(super) fn with_shared(blocks: &[(&str, u64)], shared: BlockIndex) -> Machine {
    of_file(tempfile::tempfile().unwrap(), blocks, &[shared], true)
}

fn of_file(file: File, blocks: &[(&str, u64)], ignored: &[BlockIndex], filled: bool) -> Machine {
    let entry = |(name, pages): &(&str, u64)| BlockEntry::new(BlockName::new(name).unwrap(), pages << 12);
    let list = BlockList::new(blocks.iter().map(entry).collect(), PageSize::KIB_4).unwrap();
    let mut configuration = q35("10.0");
    configuration.mapped_ram = true;
    configuration.ignore_shared = !ignored.is_empty();
    let configuration = Some(&configuration);
    let shape =
        Shape { configuration, section: SectionId(1), offset: 0, footers: true, ignored, sync_mode: None };
    let layout = Layout::of(&shape, &list).unwrap();
    let tail = Tail { switchover_start: true, devices: &devices(), about: None, base: None };
    layout
        .write(&file, &tail, |block, place| {
            let present = PageBitmap::new(place.pages());
            (0..place.pages())
                .filter(|page| filled && content(block, *page).is_some())
                .for_each(|page| present.set_run(PageIndex(page), 1));
            present.words().collect::<Vec<_>>()
        })
        .unwrap();
    for (index, place) in (0..).map(BlockIndex).zip(layout.places()) {
        for page in (0..place.pages()).filter(|_| filled && !ignored.contains(&index)) {
            if let Some(bytes) = content(index, page) {
                file.write_all_at(&bytes, place.page_offset(PageIndex(page)).unwrap()).unwrap();
            }
        }
    }
    Machine { file: MappedRamFile::open(file, 0).unwrap() }
}

impl Machine {
    pub(super) fn source(&self, options: PostcopyOptions) -> PostcopySource {
        let blocks = self.file.ram_blocks(|_, _| ReadPath::Cached).unwrap();
        PostcopySource::of_file(&self.file, Arc::new(blocks), options).unwrap()
    }

    pub(super) fn list(&self) -> &BlockList {
        self.file.blocks()
    }

    pub(super) fn pages(&self) -> u64 {
        self.list().total() >> 12
    }
}

/// What a page contains; `None` if it is zero.
pub(super) fn content(block: BlockIndex, page: u64) -> Option<Vec<u8>> {
    let word = (block.0 as u64 + 1) << 48 | page << 8 | 0xa5;
    (!page.is_multiple_of(3)).then(|| word.to_be_bytes().repeat(512))
}
