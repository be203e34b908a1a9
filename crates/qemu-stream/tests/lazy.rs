//! Machines whose guest runs before their memory is there.

#![cfg(test)]

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, MigrateOptions, Migration, RunState},
    ram::{
        Access, BlockIndex, BlockName, Decision, FaultError, Mapping, Memory, NeverDirty, PageIndex,
        PageSize, PagerError, PagerOptions, RamBlock, RamBlocks, TroubleKind,
    },
};
use multifd_testkit::HugePages;
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::{Base, Capture, CaptureOptions, LazyError, MappedRamFile, Restore, StoredMachine},
};
use rustix::fs::{MemfdFlags, memfd_create};

const LIMIT: Option<Duration> = Some(Duration::from_secs(60));
const PAGES: u64 = 4096;
const BLOCKS: [(&str, u64); 2] = [("ram", PAGES << 12), ("rom", 0x3000)];

fn block(name: &str, mapping: Mapping) -> RamBlock {
    let (name, length) = (BlockName::new(name).expect("a name"), mapping.len());
    RamBlock::new(name, length, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block")
}

fn memory() -> Arc<RamBlocks> {
    let blocks =
        BLOCKS.iter().rev().map(|(name, length)| block(name, Mapping::anonymous(*length).expect("memory")));
    Arc::new(RamBlocks::new(blocks.collect()).expect("distinct"))
}

fn memfd(length: u64, flags: MemfdFlags) -> Option<Mapping> {
    let file = File::from(memfd_create("ram", flags | MemfdFlags::CLOEXEC).ok()?);
    file.set_len(length).ok()?;
    Mapping::of_file(&file, 0, length, Access::ReadWrite).ok()
}

fn expected(name: &[u8], page: u64) -> [u8; 8] {
    if page % 5 == 2 { [0; 8] } else { (u64::from(name[1]) << 32 | (page + 1)).to_be_bytes() }
}

struct Stopped;

impl Guest for Stopped {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DeviceName::from_static("vcpu"), 8)]
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let name = DeviceName::from_static("vcpu");
        Ok(vec![DeviceSection { name, instance_id: 0, version: 1, data: vec![7; 8] }])
    }
    fn resume(&mut self) {}
}

/// A file with a machine, with digests.
fn captured() -> File {
    let blocks = filled();
    let file = tempfile::tempfile().expect("a file");
    capture(&blocks, file.try_clone().expect("a descriptor"), None);
    file
}

fn filled() -> Arc<RamBlocks> {
    let blocks = memory();
    for (_, block) in blocks.iter() {
        for page in 0..block.pages() {
            let word = expected(block.name().as_bytes(), page);
            if word != [0; 8] {
                block.store(PageIndex(page), &word.repeat(512)).expect("stored");
            }
        }
    }
    blocks
}

/// Captures what differs from the base, or all.
fn capture(blocks: &Arc<RamBlocks>, file: File, base: Option<&Base>) {
    let machine = Configuration::new(MachineType::new("my-vmm-1").expect("a name"));
    let options = CaptureOptions::new().digests(true);
    let mut capture = match base {
        None => Capture::of_guest(file, machine, blocks, &options),
        Some(base) => Capture::since(base, file, machine, blocks, &options),
    }
    .expect("laid out");
    let (stop, options) = (Stop::new(), SendOptions::new().channels(2));
    let mut sender = Sender::new(options, blocks.clone(), stop).expect("a sender");
    sender.set_up_into(capture.blocks().clone()).expect("set up");
    let migration = Migration::new(MigrateOptions::new(), sender).expect("options");
    migration.run(&mut capture, &mut NeverDirty, &mut Stopped).expect("captured");
}

fn open(file: &File) -> MappedRamFile {
    MappedRamFile::open(file.try_clone().expect("a descriptor"), 0).expect("whole")
}

/// Starts a restore; `None` if this system does not let a process serve page faults.
fn lazy(
    machine: &StoredMachine,
    blocks: &Arc<RamBlocks>,
    options: PagerOptions,
) -> Option<multifd::ram::Pager> {
    match Restore::new(machine).lazy(blocks, options) {
        Ok(pager) => Some(pager),
        Err(LazyError::Fault(error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. }))) => {
            multifd_testkit::lacks(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn word(block: &RamBlock, page: u64) -> [u8; 8] {
    let mut bytes = [0; 4096];
    block.slice(PageIndex(page), 1).expect("mapped").copy_to(&mut bytes);
    assert!(bytes.chunks(8).all(|word| word == &bytes[..8]), "page {page} is torn");
    bytes[..8].try_into().expect("eight")
}

fn assert_all(blocks: &RamBlocks) {
    for (_, block) in blocks.iter() {
        for page in 0..block.pages() {
            assert_eq!(
                word(block, page),
                expected(block.name().as_bytes(), page),
                "page {page} of {:?}",
                block.name()
            );
        }
    }
}

#[test]
fn a_guest_finds_every_page_of_memory_of_each_kind_while_it_comes() {
    let file = captured();
    let shared = |flags| {
        let blocks = BLOCKS.iter().map(|(name, length)| Some(block(name, memfd(*length, flags)?)));
        blocks.collect::<Option<Vec<_>>>().map(|blocks| Arc::new(RamBlocks::new(blocks).expect("distinct")))
    };
    let reserved = HugePages::reserve((PAGES << 12) / HugePages::BYTES);
    let huge = reserved.as_ref().and_then(|_| {
        let ram = block("ram", memfd(PAGES << 12, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?);
        let rom = block("rom", Mapping::anonymous(0x3000).expect("memory"));
        Some(Arc::new(RamBlocks::new(vec![ram, rom]).expect("distinct")))
    });
    assert_eq!(huge.is_some(), reserved.is_some(), "huge pages that are set aside can be used");
    for blocks in [Some(memory()), shared(MemfdFlags::empty()), huge].into_iter().flatten() {
        let machine = open(&file);
        let Some(pager) = lazy(&machine, &blocks, PagerOptions::new()) else { return };
        // It needs the file's descriptor, and not the machine.
        assert!(machine.devices().find("vcpu", 0).is_some());
        drop(machine);
        let guests: Vec<_> = (0..2_u64)
            .map(|seed| {
                let blocks = blocks.clone();
                thread::spawn(move || {
                    let ram = blocks.block(blocks.find(b"ram").expect("there")).expect("there");
                    for step in 0..PAGES {
                        let page = (step * 1021 + seed * 500) % PAGES;
                        assert_eq!(word(ram, page), expected(b"ram", page), "page {page}");
                    }
                })
            })
            .collect();
        guests.into_iter().for_each(|guest| guest.join().expect("no wrong byte"));
        let stats = pager.finish(LIMIT).expect("all there");
        assert_eq!((stats.missing, stats.poisoned), (0, 0));
        drop(pager);
        assert_all(&blocks);
    }
}

#[test]
fn a_guest_finds_every_page_of_a_delta_and_its_base_while_it_comes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let file = |name: &str| {
        File::create_new(path(name)).and_then(|_| File::options().read(true).write(true).open(path(name)))
    };
    let blocks = filled();
    capture(&blocks, file("base").expect("a file"), None);
    let ram = blocks.block(blocks.find(b"ram").expect("there")).expect("there");
    ram.store(PageIndex(77), &[9; 4096]).expect("stored");
    ram.clear(PageIndex(78));
    let base = Base::new(&StoredMachine::open(&path("base"), 0).expect("whole"), "base").expect("a base");
    capture(&blocks, file("delta").expect("a file"), Some(&base));

    let machine = StoredMachine::open(&path("delta"), 0).expect("with its base");
    let restored = memory();
    let Some(pager) = lazy(&machine, &restored, PagerOptions::new()) else { return };
    let of = restored.block(restored.find(b"ram").expect("there")).expect("there");
    for page in [78, 77, 4095, 0, 1, 79] {
        assert_eq!(word(of, page), word(ram, page), "page {page}");
    }
    pager.finish(LIMIT).expect("all of it");
    assert!((0..PAGES).all(|page| word(ram, page) == word(of, page)));
}

/// Bytes that are on the disk reach the guest past the page cache, which has nothing of the file afterwards.
#[test]
fn a_guest_finds_every_page_past_the_page_cache() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("machine");
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
    capture(&filled(), file.try_clone().expect("a descriptor"), None);
    if multifd::ram::DirectFile::of(&file).is_err() {
        return multifd_testkit::lacks("a file system with direct I/O");
    }
    let machine = open(&file);
    file.sync_all().expect("on the disk");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("dropped");
    // The second time, the page cache has the file if the first one has left it there.
    for round in 0..2 {
        let before = read_from_disks();
        let blocks = memory();
        let options = PagerOptions::new().prefetch_bytes(64 << 10);
        let pager = match Restore::new(&machine).direct_io(true).lazy(&blocks, options) {
            Ok(pager) => pager,
            Err(LazyError::Fault(error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. }))) => {
                return multifd_testkit::lacks(&error.to_string());
            }
            Err(error) => panic!("{error}"),
        };
        assert_all(&blocks);
        pager.finish(LIMIT).expect("all there");
        // Four of five pages have contents.
        let read = read_from_disks() - before;
        assert!(read > (PAGES << 12) / 2, "round {round}: only {read} bytes were read from the disk");
    }
}

/// The bytes that this process has caused disks to read.
fn read_from_disks() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").expect("counted");
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: "));
    line.and_then(|number| number.parse().ok()).expect("a number")
}

#[test]
fn two_machines_from_one_file_have_nothing_in_common() {
    let file = captured();
    let machine = open(&file);
    let (one, other) = (memory(), memory());
    let Some(first) = lazy(&machine, &one, PagerOptions::new()) else { return };
    let second = lazy(&machine, &other, PagerOptions::new()).expect("as the first");
    // What one guest writes, while both are restored.
    let ram = one.block(one.find(b"ram").expect("there")).expect("there");
    (0..PAGES).step_by(7).for_each(|page| ram.store(PageIndex(page), &[9; 4096]).expect("stored"));
    first.finish(LIMIT).expect("all there");
    second.finish(LIMIT).expect("all there");
    assert_all(&other);
    for page in 0..PAGES {
        let found = word(ram, page);
        assert_eq!(found, if page % 7 == 0 { [9; 8] } else { expected(b"ram", page) });
    }
    let again = memory();
    Restore::new(&machine).run(&again, &Stop::new()).expect("the file is unchanged");
    assert_all(&again);
}

/// Damages a page of "ram" in the file.
fn damage(file: &File, page: u64) {
    let machine = open(file);
    let index =
        machine.blocks().iter().position(|(_, entry)| entry.name.as_bytes() == b"ram").expect("there");
    let place = machine.place(BlockIndex(index)).expect("there");
    let at = place.page_offset(PageIndex(page)).expect("there");
    file.write_all_at(b"rot", at + 1000).expect("damaged");
}

#[test]
fn a_damaged_page_never_reaches_the_guest_and_the_others_do() {
    let file = captured();
    damage(&file, 1500);
    let (machine, blocks) = (open(&file), memory());
    let Some(pager) = lazy(&machine, &blocks, PagerOptions::new()) else { return };
    let error = pager.finish(LIMIT).expect_err("damaged");
    assert!(matches!(error, PagerError::Poisoned { pages: 1, .. }), "{error}");
    assert!(error.to_string().contains("at offset 0x5dc000 of block \"ram\""), "{error}");
    let ram = blocks.block(blocks.find(b"ram").expect("there")).expect("there");
    for page in (0..PAGES).filter(|page| *page != 1500) {
        assert_eq!(word(ram, page), expected(b"ram", page));
    }
}

#[test]
fn the_embedder_may_wait_until_a_damaged_file_is_repaired() {
    let file = captured();
    let machine = open(&file);
    let index =
        machine.blocks().iter().position(|(_, entry)| entry.name.as_bytes() == b"ram").expect("there");
    let at = machine.place(BlockIndex(index)).expect("there").page_offset(PageIndex(1500)).expect("there");
    damage(&file, 1500);
    let (blocks, asked) = (memory(), Arc::new(AtomicU64::new(0)));
    let (repairs, count) = (file.try_clone().expect("a descriptor"), asked.clone());
    let options = PagerOptions::new().retry(Duration::from_millis(10)).judge(move |trouble| {
        let TroubleKind::Failed(error) = &trouble.kind else { panic!("{trouble}") };
        assert!(error.to_string().contains("differs from its digest"), "{error}");
        if count.fetch_add(1, Ordering::Relaxed) == 2 {
            repairs.write_all_at(&expected(b"ram", 1500).repeat(512), at).expect("repaired");
        }
        Decision::Wait
    });
    let Some(pager) = lazy(&machine, &blocks, options) else { return };
    pager.finish(LIMIT).expect("all there");
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    assert_all(&blocks);
}

#[test]
fn a_file_that_becomes_shorter_is_an_error_of_its_pages() {
    let file = captured();
    let (machine, blocks) = (open(&file), memory());
    let stopped = Arc::new(AtomicBool::new(false));
    file.set_len(4 << 20).expect("shorter");
    let note = stopped.clone();
    let options = PagerOptions::new().judge(move |_| {
        note.store(true, Ordering::Relaxed);
        Decision::Stop
    });
    let Some(pager) = lazy(&machine, &blocks, options) else { return };
    let error = pager.finish(LIMIT).expect_err("short");
    assert!(matches!(error, PagerError::Stopped { .. }) && stopped.load(Ordering::Relaxed), "{error}");
}

#[test]
fn blocks_that_do_not_fit_and_memory_with_contents_are_refused() {
    let machine = open(&captured());
    let fresh = |length| Mapping::anonymous(length).expect("memory");
    let refuse = |blocks: Vec<RamBlock>, expected: &str| {
        let blocks = Arc::new(RamBlocks::new(blocks).expect("distinct"));
        match Restore::new(&machine).lazy(&blocks, PagerOptions::new()) {
            Err(LazyError::Fault(FaultError::NotPermitted { .. } | FaultError::Lacks { .. })) => {}
            Err(error) => assert!(format!("{}", multifd::error::chain(&error)).contains(expected), "{error}"),
            Ok(_) => panic!("expected {expected}"),
        }
    };
    let rom = || block("rom", fresh(0x3000));
    refuse(vec![rom()], r#"block "ram": it is in the file, and the machine has no such block"#);
    refuse(
        vec![rom(), block("ram", fresh(1 << 20))],
        r#"block "ram": it has 0x100000 bytes, in the file 0x1000000"#,
    );
    let extra = vec![rom(), block("ram", fresh(PAGES << 12)), block("more", fresh(4096))];
    refuse(extra, r#"block "more": the file has no such block"#);
    refuse(vec![rom(), block("ram", fresh(PAGES << 12)).ignored()], "must not be an ignored block");
    let used = block("ram", fresh(PAGES << 12));
    used.store(PageIndex(3), &[1; 4096]).expect("stored");
    // In a huge page, all pages exist.
    refuse(vec![rom(), used], "exists already, and a page that exists causes no fault");
}
