//! RAM in files, at either end.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use multifd::{
    live::{MigrateOptions, ZeroPageDetection},
    ram::{
        BlockIndex, DirectFile, Memory, NeverDirty, PageBitmap, PageIndex, PageSize, Places, RamBlock,
        RamBlocks,
    },
};

use crate::kit::{StoppedGuest, fresh, migrate, name};

const LENGTH: u64 = 4 << 20;

/// A block in a file from `offset` on, with different pages; page 5 is not present, with garbage in the file.
fn in_a_file(file: &Arc<File>, offset: u64, direct: bool) -> Arc<RamBlocks> {
    let page_size = PageSize::KIB_4;
    for page in 0..LENGTH / 4096 {
        let bytes: Vec<u8> = std::iter::repeat_n((page + 1).to_be_bytes(), 512).flatten().collect();
        file.write_all_at(&bytes, offset + page * 4096).expect("written");
    }
    let present = PageBitmap::full(LENGTH / 4096);
    present.clear(PageIndex(5));
    let direct = direct.then(|| Arc::new(DirectFile::of(file).expect("direct I/O")));
    let memory = Memory::MappedRam(Places::new(file.clone(), offset, present).past_cache(direct));
    let block = RamBlock::new(name("pc.ram"), LENGTH, page_size, memory);
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))
}

/// The contents of a block in a file.
fn loaded(blocks: &RamBlocks) -> Vec<u8> {
    let block = blocks.block(BlockIndex(0)).expect("there");
    let mut bytes = vec![0; usize::try_from(LENGTH).expect("small")];
    for (page, bytes) in (0..).map(PageIndex).zip(bytes.chunks_mut(4096)) {
        block.load(page, bytes).expect("loaded");
    }
    bytes
}

fn fresh_in_a_file(file: File, direct: bool) -> Arc<RamBlocks> {
    let file = Arc::new(file);
    let direct = direct.then(|| Arc::new(DirectFile::of(&file).expect("direct I/O")));
    let none = PageBitmap::new(LENGTH / 4096);
    let memory = Memory::MappedRam(Places::new(file, 1 << 20, none).past_cache(direct));
    let block = RamBlock::new(name("pc.ram"), LENGTH, PageSize::KIB_4, memory);
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))
}

/// At an offset that suits direct I/O, and at one that does not.
#[test]
fn pages_go_from_file_to_file_past_the_page_cache_and_through_it() {
    let (none, multifd) = (ZeroPageDetection::None, ZeroPageDetection::Multifd);
    for (offset, detection) in [(1 << 20, none), (12345, none), (1 << 20, multifd)] {
        for (from, to) in [(false, false), (true, false), (false, true), (true, true)] {
            let file = Arc::new(tempfile::tempfile().expect("a file"));
            let source = in_a_file(&file, offset, from);
            let destination = fresh_in_a_file(tempfile::tempfile().expect("a file"), to);
            let options = MigrateOptions::new().zero_page_detection(detection);
            let mut guest = StoppedGuest::default();
            let outcome = migrate(&source, &destination, 3, options, &mut NeverDirty, &mut guest);
            outcome.sent.expect("sent");
            outcome.received.expect("received");
            assert!(
                loaded(&source) == loaded(&destination),
                "offset {offset}, {detection:?}, direct {from}, {to}"
            );
            let block = destination.block(BlockIndex(0)).expect("there");
            // With none, a page that is known to be zero is sent as zeros.
            assert_eq!(block.is_present(PageIndex(5)), detection == none);
            assert!(block.is_present(PageIndex(6)));
        }
    }
}

#[test]
fn pages_go_from_a_file_into_memory() {
    let file = Arc::new(tempfile::tempfile().expect("a file"));
    let source = in_a_file(&file, 1 << 20, true);
    let destination = fresh(PageSize::KIB_4, &[("pc.ram", LENGTH)]);
    let options = MigrateOptions::new();
    migrate(&source, &destination, 2, options, &mut NeverDirty, &mut StoppedGuest::default())
        .received
        .expect("received");
    let mut bytes = vec![0; usize::try_from(LENGTH).expect("small")];
    let block = destination.block(BlockIndex(0)).expect("there");
    block.slice(PageIndex(0), block.pages()).expect("there").copy_to(&mut bytes);
    assert!(bytes == loaded(&source), "equal RAM");
}

/// The file is truncated: this is an error of the read that reaches the end, not a signal.
#[test]
fn file_that_is_cut_is_an_error() {
    for direct in [false, true] {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        let source = in_a_file(&file, 1 << 20, direct);
        file.set_len(3 << 20).expect("cut");
        let destination = fresh(PageSize::KIB_4, &[("pc.ram", LENGTH)]);
        let options = MigrateOptions::new();
        let outcome =
            migrate(&source, &destination, 2, options, &mut NeverDirty, &mut StoppedGuest::default());
        let error = outcome.sent.expect_err("cut").to_string();
        assert!(error.contains(r#"read block "pc.ram" at offset 0x"#), "{error}");
    }
}
