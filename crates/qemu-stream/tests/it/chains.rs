//! Deltas and chains of them: every state of a machine comes back, and what is not the right base is refused by name.

use std::{
    fs::{self, File},
    num::NonZero,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
};

use multifd::{
    Result, SendOptions, Sender,
    channel::Stop,
    error::chain,
    live::{Guest, MigrateOptions, Migration, MigrationInfo, ZeroPageDetection},
    ram::{
        BlockIndex, BlockName, DirtyBitmaps, DirtyLog, KeptLog, Mapping, Memory, NeverDirty, PageIndex,
        PageSize, RamBlock, RamBlocks,
    },
};
use qemu_stream::mapped_ram::{
    Base, Capture, CaptureOptions, Captured, ChainFile, Digests, FoundFile, MappedRamFile, Merge, Restore,
    StoredMachine, Verify,
};
use tempfile::TempDir;

use crate::{
    machine::Machine,
    snapshots::{Stopped, configuration},
};

const PAGE: u64 = 4096;
type Ram = [(&'static str, u64)];
const RAM: &Ram = &[("ram", 3 << 20), ("rom", 0x3000)];

fn memory(ram: &Ram) -> Arc<RamBlocks> {
    let block = |(name, length): &(&str, u64)| {
        let memory = Memory::Mapped(Mapping::anonymous(*length).expect("memory"));
        RamBlock::new(BlockName::new(*name).expect("a name"), *length, PageSize::KIB_4, memory)
            .expect("a block")
    };
    Arc::new(RamBlocks::new(ram.iter().map(block).collect()).expect("distinct"))
}

fn write(blocks: &RamBlocks, block: usize, page: u64, value: u64) {
    let bytes = value.to_be_bytes().repeat(512);
    blocks.block(BlockIndex(block)).expect("there").store(PageIndex(page), &bytes).expect("stored");
}

fn bytes(blocks: &RamBlocks) -> Vec<Vec<u8>> {
    let of = |(_, block): (_, &RamBlock)| {
        let slice = block.slice(PageIndex(0), block.pages()).expect("mapped");
        let mut bytes = vec![0; slice.len()];
        slice.copy_to(&mut bytes);
        bytes
    };
    blocks.iter().map(of).collect()
}

/// A pseudo-random number.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

fn options() -> CaptureOptions {
    CaptureOptions::new().digests(true)
}

fn run(
    capture: &mut Capture,
    blocks: &Arc<RamBlocks>,
    log: &mut dyn DirtyLog,
    guest: &mut dyn Guest,
    channels: u8,
) -> Result<MigrationInfo> {
    let (stop, options) = (Stop::new(), MigrateOptions::new());
    let migration = if channels == 0 {
        Migration::over_main(options, blocks.clone(), stop)?
    } else {
        let mut sender = Sender::new(SendOptions::new().channels(channels), blocks.clone(), stop)?;
        sender.set_up_into(capture.blocks().clone())?;
        Migration::new(options.zero_page_detection(ZeroPageDetection::Multifd), sender)?
    };
    migration.run(capture, log, guest)
}

/// Captures stopped blocks at `path`; without a base, or what differs from it.
fn capture(
    blocks: &Arc<RamBlocks>,
    path: &Path,
    base: Option<&Base>,
    log: &mut dyn DirtyLog,
    channels: u8,
) -> Result<Captured> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).expect("a file");
    let mut capture = match base {
        None => Capture::of_guest(file, configuration(), blocks, &options()),
        Some(base) => Capture::since(base, file, configuration(), blocks, &options()),
    }?;
    run(&mut capture, blocks, log, &mut Stopped::default(), channels)?;
    Ok(*capture.captured().expect("complete, with digests"))
}

fn open(path: &Path) -> StoredMachine {
    StoredMachine::open(path, 0).unwrap_or_else(|error| panic!("{}", told(&error)))
}

/// The base in the file at `path`, for a delta in the same folder.
fn base(path: &Path) -> Base {
    Base::new(&open(path), path.file_name().expect("a name")).expect("a base")
}

fn told(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn refused(path: &Path) -> String {
    told(&StoredMachine::open(path, 0).expect_err("refused"))
}

fn restored(machine: &StoredMachine, ram: &Ram, channels: u8) -> Vec<Vec<u8>> {
    let blocks = memory(ram);
    for (_, block) in blocks.iter() {
        // What is not in a file must become zero.
        block.store(PageIndex(block.pages() - 1), &[0xee; 4096]).expect("stored");
    }
    Restore::new(machine).channels(channels).run(&blocks, &Stop::new()).expect("restored");
    bytes(&blocks)
}

fn merged(machine: &StoredMachine, path: &Path) -> MappedRamFile {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).expect("a file");
    let merge = Merge::new(machine).threads(NonZero::<u8>::MIN.saturating_add(2));
    merge.run(&Arc::new(file), None, &AtomicU64::new(0), &Stop::new()).expect("merged");
    MappedRamFile::open(File::open(path).expect("there"), 0).expect("a whole machine")
}

#[track_caller]
fn assert_is(machine: &StoredMachine, ram: &Ram, expected: &[Vec<u8>]) {
    assert!(restored(machine, ram, 2) == expected, "every byte");
    let found = Verify::new(machine).run(&AtomicU64::new(0), &Stop::new()).expect("it has digests");
    assert_eq!(found.damaged_pages, 0, "{found:?}");
}

fn folder() -> (TempDir, impl Fn(&str) -> PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    (folder, move |name: &str| path.join(name))
}

/// Sixty-four files, half of them by digests, half by a log that was kept; every one is the machine at its time.
#[test]
fn every_file_of_a_chain_of_64_is_the_machine_of_its_time() {
    let (_folder, path) = folder();
    let blocks = memory(RAM);
    let pages = |block: usize| RAM[block].1 / PAGE;
    let mut seed = 7;
    let writes = DirtyBitmaps::new(&blocks);
    let mut log = KeptLog::new(writes.reader().expect("alone"));
    let mut states = Vec::new();
    let mut last: Option<(PathBuf, Captured)> = None;
    for number in 0..StoredMachine::MOST_FILES as u64 {
        for _ in 0..if number == 0 { 500 } else { 20 } {
            let block = usize::from(next(&mut seed).is_multiple_of(9));
            let page = PageIndex(next(&mut seed) % pages(block));
            // Some become zero, some are written with what they have.
            let value = next(&mut seed) % 4;
            write(&blocks, block, page.0, value);
            writes.mark(BlockIndex(block), page);
        }
        let file = path(&format!("{number}"));
        let base = last.as_ref().map(|(path, captured)| {
            let base = base(path);
            if number % 2 == 0 { base } else { base.with_log(captured).expect("the same root") }
        });
        let channels = u8::try_from(number % 4).expect("small");
        let captured = capture(&blocks, &file, base.as_ref(), &mut log, channels).expect("captured");
        last = Some((file, captured));
        states.push(bytes(&blocks));
    }
    for (number, state) in states.iter().enumerate() {
        let machine = open(&path(&format!("{number}")));
        assert_eq!(machine.files().len(), number + 1);
        assert_is(&machine, RAM, state);
    }
    let newest = open(&path("63"));
    let whole = merged(&newest, &path("merged"));
    assert_is(&whole, RAM, states.last().expect("64"));
    // The merged file is what a capture without a base writes.
    capture(&blocks, &path("whole"), None, &mut NeverDirty, 2).expect("captured");
    let bits = |file: &StoredMachine| file.bitmap(BlockIndex(0)).expect("read").words().collect::<Vec<_>>();
    assert_eq!(bits(&whole), bits(&open(&path("whole"))));
    let refused = Base::new(&newest, "63").expect_err("a delta would be file 65");
    assert!(told(&refused).contains("merge some of them"), "{}", told(&refused));
}

#[test]
fn delta_has_only_what_changed_and_a_page_that_became_zero_is_a_hole() {
    let (_folder, path) = folder();
    let blocks = memory(RAM);
    for page in 0..700 {
        write(&blocks, 0, page, page + 1);
    }
    capture(&blocks, &path("base"), None, &mut NeverDirty, 2).expect("captured");
    write(&blocks, 0, 3, 99);
    (100..600).for_each(|page| write(&blocks, 0, page, 0));
    capture(&blocks, &path("delta"), Some(&base(&path("base"))), &mut NeverDirty, 2).expect("captured");
    let machine = open(&path("delta"));
    let [delta, whole] = machine.files() else { panic!("two files") };
    assert_eq!(delta.bitmap(BlockIndex(0)).expect("read").count(), 501);
    assert_eq!(machine.bitmap(BlockIndex(0)).expect("read").count(), 200);
    assert_eq!(delta.base().map(|base| base.root), whole.root());
    let on_disk = |path| fs::metadata(path).expect("there").blocks() * 512;
    let (small, large) = (on_disk(path("delta")), on_disk(path("base")));
    assert!(small < large / 20, "{small} of {large}");
    assert_is(&machine, RAM, &bytes(&blocks));
    // Without holes it is larger and the same.
    fs::write(path("filled"), fs::read(path("delta")).expect("read")).expect("written");
    assert_is(&open(&path("filled")), RAM, &bytes(&blocks));
}

#[test]
fn delta_is_no_whole_machine() {
    let (_folder, path) = folder();
    let blocks = memory(RAM);
    capture(&blocks, &path("base"), None, &mut NeverDirty, 1).expect("captured");
    capture(&blocks, &path("delta"), Some(&base(&path("base"))), &mut NeverDirty, 1).expect("captured");
    let delta = || File::open(path("delta")).expect("there");
    for refused in [MappedRamFile::open(delta(), 0), MappedRamFile::open_damaged(delta(), 0)] {
        let text = told(&refused.expect_err("not whole"));
        assert!(text.contains("it is a delta"), "{text}");
    }
    let mut head = [0; 8];
    delta().read_exact_at(&mut head, 0).expect("read");
    assert_eq!(&head, b"QEVMmfD\x01");
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).expect("there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("written");
}

/// A base, and a delta of it.
fn pair() -> (TempDir, impl Fn(&str) -> PathBuf, Arc<RamBlocks>) {
    let (folder, path) = folder();
    let blocks = memory(RAM);
    (0..700).for_each(|page| write(&blocks, 0, page, page + 1));
    capture(&blocks, &path("base"), None, &mut NeverDirty, 2).expect("captured");
    write(&blocks, 0, 5, 99);
    capture(&blocks, &path("delta"), Some(&base(&path("base"))), &mut NeverDirty, 2).expect("captured");
    (folder, path, blocks)
}

#[test]
fn base_that_is_missing_replaced_or_changed_is_refused_by_name() {
    let (_folder, path, blocks) = pair();
    fs::rename(path("base"), path("moved")).expect("moved");
    let text = refused(&path("delta"));
    assert!(text.contains(r#"the base "base" of "#) && text.contains("it was moved or removed"), "{text}");
    // Another capture of the same machine, and the machine of a later time.
    capture(&blocks, &path("base"), None, &mut NeverDirty, 2).expect("captured");
    let text = refused(&path("delta"));
    assert!(text.contains(r#"the base "base""#) && text.contains("another file than"), "{text}");
    // A file without digests, a delta that names itself, no machine at all.
    fs::copy(path("moved"), path("base")).expect("copied");
    let end = open(&path("base")).files()[0].file().metadata().expect("asked").len();
    File::options().write(true).open(path("base")).expect("there").set_len(end - 30).expect("cut");
    assert!(refused(&path("delta")).contains("base"), "{}", refused(&path("delta")));
    fs::remove_file(path("base")).expect("removed");
    fs::hard_link(path("delta"), path("base")).expect("linked");
    let text = refused(&path("delta"));
    assert!(text.contains("the files name each other"), "{text}");
    fs::remove_file(path("base")).expect("removed");
    fs::write(path("base"), "no machine").expect("written");
    let text = refused(&path("delta"));
    assert!(text.contains(r#"the base "base""#) && text.contains("it is not valid"), "{text}");
    // The right one at another place.
    let newest = FoundFile::open(&path("delta"), 0).expect("opened");
    let moved = |_: &ChainFile, _: &_| FoundFile::open(&path("moved"), 0);
    let machine = StoredMachine::open_with(newest, Digests::Compare, moved).expect("the right base");
    assert_is(&machine, RAM, &bytes(&blocks));
}

#[test]
fn one_changed_byte_of_a_base_is_found_with_the_name_of_the_file() {
    let (_folder, path, blocks) = pair();
    let machine = open(&path("delta"));
    let place = machine.files()[1].places()[0];
    let last = machine.files()[1].places()[1];
    let tail = last.pages_offset + last.used_length + 50;
    drop(machine);
    for at in [1, place.bitmap_offset, tail] {
        flip(&path("base"), at);
        let text = refused(&path("delta"));
        assert!(text.contains(r#"the base "base""#), "{at:#x}: {text}");
        flip(&path("base"), at);
    }
    let of = |page| place.page_offset(PageIndex(page)).expect("there") + 7;
    flip(&path("base"), of(6));
    let machine = open(&path("delta"));
    let blocks_read = memory(RAM);
    let error = Restore::new(&machine).run(&blocks_read, &Stop::new()).expect_err("damaged");
    let text = told(&error);
    assert!(text.contains("differs from its digest in \"") && text.contains("base\""), "{text}");
    let found = Verify::new(&machine).run(&AtomicU64::new(0), &Stop::new()).expect("it has digests");
    assert_eq!((found.damaged_pages, found.damage[0].file, found.damage[0].offset.0), (1, 1, 6 * PAGE));
    // A delta of the damaged base stores what cannot be read.
    capture(&blocks, &path("again"), Some(&base(&path("base"))), &mut NeverDirty, 2).expect("captured");
    let again = open(&path("again"));
    assert!(restored(&again, RAM, 2) == bytes(&blocks), "the damaged page is not needed");
    flip(&path("base"), of(6));
    // The delta's own page hides that of the base.
    flip(&path("base"), of(5));
    assert!(restored(&open(&path("delta")), RAM, 1) == bytes(&blocks));
}

#[test]
fn blocks_that_grow_shrink_come_and_go_have_their_own_pages() {
    let (_folder, path) = folder();
    let shapes: [&Ram; 4] = [
        &[("a", 8 * PAGE), ("b", 4 * PAGE)],
        &[("a", 4 * PAGE), ("c", 4 * PAGE)],
        &[("c", 6 * PAGE), ("a", 8 * PAGE)],
        &[("b", 4 * PAGE), ("a", 9 * PAGE)],
    ];
    let mut last: Option<PathBuf> = None;
    for (number, ram) in shapes.into_iter().enumerate() {
        let blocks = memory(ram);
        for (index, (name, length)) in ram.iter().enumerate() {
            // The same contents at each time, and nothing where "a" has grown and in the new "b".
            let written = if number >= 2 { length.min(&(4 * PAGE)) / PAGE } else { length / PAGE };
            for page in (0..written).filter(|_| number == 0 || *name != "b") {
                write(&blocks, index, page, u64::from(name.as_bytes()[0]) << 8 | page);
            }
        }
        let file = path(&format!("{number}"));
        let base = last.as_deref().map(base);
        capture(&blocks, &file, base.as_ref(), &mut NeverDirty, 2).expect("captured");
        let machine = open(&file);
        assert_is(&machine, ram, &bytes(&blocks));
        assert_is(&merged(&machine, &path("merged")), ram, &bytes(&blocks));
        last = Some(file);
    }
}

#[test]
fn capture_over_a_file_of_its_base_is_refused() {
    let (_folder, path, blocks) = pair();
    for name in ["base", "delta"] {
        let of_delta = base(&path("delta"));
        let before = fs::read(path(name)).expect("read");
        let file = File::options().read(true).write(true).open(path(name)).expect("there");
        let refused =
            Capture::since(&of_delta, file, configuration(), &blocks, &options()).expect_err("lost");
        assert!(told(&refused).contains("would overwrite its base"), "{}", told(&refused));
        assert!(fs::read(path(name)).expect("read") == before);
    }
}

#[test]
fn log_that_was_not_kept_since_the_base_is_refused_and_nothing_is_written() {
    let (_folder, path) = folder();
    let blocks = memory(RAM);
    let writes = DirtyBitmaps::new(&blocks);
    let mut log = KeptLog::new(writes.reader().expect("alone"));
    let first = capture(&blocks, &path("1"), None, &mut log, 2).expect("captured");
    let second = capture(&blocks, &path("2"), None, &mut log, 2).expect("captured");
    // Two captures of one state are the same machine. The log knows only the second one.
    assert_eq!(first.root, second.root);
    let refused = |captured: &Captured, log: &mut dyn DirtyLog| {
        let since = base(&path("1")).with_log(captured).expect("the same root");
        let error = capture(&blocks, &path("x"), Some(&since), log, 2).expect_err("refused");
        told(&error)
    };
    let text = refused(&first, &mut log);
    assert!(text.contains("the base is another one"), "{text}");
    let text = refused(&second, &mut NeverDirty);
    assert!(text.contains("not one that was kept"), "{text}");
    drop(log);
    let mut again = KeptLog::new(writes.reader().expect("alone"));
    let text = refused(&second, &mut again);
    assert!(text.contains("another dirty log"), "{text}");
    assert!(StoredMachine::open(&path("x"), 0).is_err(), "nothing in it counts");
    // Without a log, or with another base.
    let plain = capture(&blocks, &path("3"), None, &mut NeverDirty, 2).expect("captured");
    assert!(told(&base(&path("3")).with_log(&plain).expect_err("no log")).contains("without a dirty log"));
    write(&blocks, 0, 1, 1);
    let other = capture(&blocks, &path("4"), None, &mut again, 2).expect("captured");
    assert!(told(&base(&path("3")).with_log(&other).expect_err("another root")).contains("its root is"));
}

/// One page of a million is written before a capture that fails, and one after it.
#[test]
fn one_page_in_a_million_is_in_the_delta_also_after_captures_that_failed() {
    let (_folder, path) = folder();
    let ram: &Ram = &[("ram", PAGE << 20)];
    let blocks = memory(ram);
    write(&blocks, 0, 77, 1);
    let writes = DirtyBitmaps::new(&blocks);
    let mut log = KeptLog::new(writes.reader().expect("alone"));
    let captured = capture(&blocks, &path("base"), None, &mut log, 2).expect("captured");
    let since = || base(&path("base")).with_log(&captured).expect("the same root");
    let wrote = |page, value| {
        write(&blocks, 0, page, value);
        writes.mark(BlockIndex(0), PageIndex(page));
    };
    // One fails before the end of RAM, one when the log has given its mark.
    for (page, about) in [(700_000, ""), (123_456, &*"x".repeat((1 << 20) + 1))] {
        wrote(page, page);
        let file = File::options().read(true).write(true).create_new(true).open(path(&format!("{page}")));
        let options = options().about(about);
        let file = file.expect("a file");
        let mut capture =
            Capture::since(&since(), file, configuration(), &blocks, &options).expect("laid out");
        let (mut whole, mut machine) = (Stopped::default(), Machine::new(memory(RAM), 0));
        let mut broken = Fails(&mut machine);
        let guest: &mut dyn Guest = if about.is_empty() { &mut broken } else { &mut whole };
        run(&mut capture, &blocks, &mut log, guest, 2).expect_err("it fails");
        assert_eq!(capture.captured(), None);
    }
    wrote(1_048_575, 3);
    capture(&blocks, &path("by log"), Some(&since()), &mut log, 2).expect("captured");
    capture(&blocks, &path("by digests"), Some(&base(&path("base"))), &mut NeverDirty, 2).expect("captured");
    for name in ["by log", "by digests"] {
        let machine = open(&path(name));
        let of_delta = machine.files()[0].bitmap(BlockIndex(0)).expect("read");
        let pages: Vec<_> = of_delta.set_runs().map(|(first, count)| (first.0, count)).collect();
        assert_eq!(pages, [(123_456, 1), (700_000, 1), (1_048_575, 1)], "{name}");
        let read = machine.ram_blocks(|_, _| qemu_stream::mapped_ram::ReadPath::Cached).expect("read");
        let block = read.block(BlockIndex(0)).expect("there");
        for (page, value) in [(77, 1_u64), (700_000, 700_000), (123_456, 123_456), (1_048_575, 3)] {
            let mut bytes = [0; 4096];
            block.load(PageIndex(page), &mut bytes).expect("read");
            assert_eq!(bytes[..8], value.to_be_bytes(), "{name}, page {page}");
            assert_eq!(
                block.position_of(PageIndex(page)).map(|(file, _)| file),
                Some(usize::from(page == 77))
            );
        }
    }
}

/// A guest that writes all the time: every capture is checked page by page, those by a log and those by digests. The guest
/// of one capture fails, and the next delta has what that capture had taken.
#[test]
fn no_write_of_a_running_guest_is_lost_between_captures() {
    let (_folder, path) = folder();
    let blocks = memory(&[("ram", 2 << 20)]);
    let mut machine = Machine::new(blocks.clone(), 0);
    let mut log = KeptLog::new(machine.writes.reader().expect("alone"));
    let mut last: Option<(PathBuf, Captured)> = None;
    let ram: &Ram = &[("ram", 2 << 20)];
    for number in 0..30 {
        machine.run();
        while number % 3 == 0 && machine.writes.count(BlockIndex(0)) < 64 {
            std::thread::yield_now();
        }
        let file = path(&format!("{number}"));
        let new = File::options().read(true).write(true).create_new(true).open(&file).expect("a file");
        let base = last.as_ref().map(|(path, captured)| {
            let base = base(path);
            if number % 5 == 4 { base } else { base.with_log(captured).expect("the same root") }
        });
        let mut capture = match &base {
            None => Capture::of_guest(new, configuration(), &blocks, &options()),
            Some(base) => Capture::since(base, new, configuration(), &blocks, &options()),
        }
        .expect("laid out");
        if number % 7 == 6 {
            // It has taken pages when it fails, and its mark is not valid.
            let mut fails = Fails(&mut machine);
            let error = run(&mut capture, &blocks, &mut log, &mut fails, 2).expect_err("it fails");
            assert!(told(&error).contains("save the devices"), "{}", told(&error));
            continue;
        }
        run(&mut capture, &blocks, &mut log, &mut machine, 2).expect("captured");
        let count = machine.count;
        last = Some((file.clone(), *capture.captured().expect("complete")));
        let stored = open(&file);
        assert_is(&stored, ram, &bytes(&blocks));
        let again = Machine::new(memory(ram), count);
        Restore::new(&stored).run(&again.blocks, &Stop::new()).expect("restored");
        assert!(again.is_whole(), "capture {number}: the last number written to every page");
    }
}

/// A guest whose devices cannot be saved.
struct Fails<'a>(&'a mut Machine);

impl Guest for Fails<'_> {
    fn devices(&self) -> Vec<multifd::live::DeviceInfo> {
        self.0.devices()
    }
    fn run_state(&mut self) -> multifd::live::RunState {
        self.0.run_state()
    }
    fn stop(&mut self) -> std::io::Result<()> {
        self.0.stop()
    }
    fn save(&mut self) -> std::io::Result<Vec<multifd::live::DeviceSection>> {
        Err(std::io::ErrorKind::Other.into())
    }
    fn resume(&mut self) {
        self.0.resume();
    }
}
