//! RAM directly between memory and a file, with the channels of a sender that does not connect.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use multifd::{
    Error, Result, SendOptions, Sender, Synced,
    channel::{Stop, Wake},
    error::Usage,
    live::{
        DeviceInfo, DeviceSection, Main, MigrateOptions, Migration, MigrationInfo, Pass, RunState, Verdict,
        ZeroPageDetection,
    },
    ram::{
        Access, BlockIndex, DirectFile, DirtyBitmaps, DirtyLog, Mapping, Memory, NeverDirty, PageBitmap,
        PageIndex, PageSize, Places, RamBlock, RamBlocks,
    },
};
use multifd_testkit::lacks;

use crate::kit::{StoppedGuest, difference, fresh, name, write};

const PAGE: u64 = 4096;
const RAM: &[(&str, u64)] = &[("pc.ram", 20 << 20), ("pc.rom", 3 * PAGE)];
/// The position of the first block in its file: a huge page of the file is not aligned with one of memory.
const OFFSET: u64 = 1 << 20;

/// A main stream that only has zero pages, which are cleared in the target.
struct Quiet<'a>(&'a RamBlocks);

impl Main for Quiet<'_> {
    fn begin(&mut self, _channels: u8) -> Result<()> {
        Ok(())
    }
    fn setup(&mut self, _: &RamBlocks, _: Option<Synced<'_>>) -> Result<()> {
        Ok(())
    }
    fn begin_pass(&mut self, _: Pass) -> Result<()> {
        Ok(())
    }
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.0.block(block)?.clear(page);
        Ok(())
    }
    fn page(&mut self, _: BlockIndex, _: PageIndex, _: &[u8]) -> Result<()> {
        unreachable!("pages go over channels")
    }
    fn end_pass(&mut self, _: Pass, _: Option<Synced<'_>>) -> Result<()> {
        Ok(())
    }
    fn switchover(&mut self) -> Result<()> {
        Ok(())
    }
    fn devices(&mut self, _: Vec<DeviceSection>, _: RunState) -> Result<()> {
        Ok(())
    }
    fn complete(&mut self, stop: &Stop) -> Verdict {
        stop.check().map_or_else(Verdict::Refused, |()| Verdict::Taken)
    }
    fn expect(&mut self, _: &[DeviceInfo]) -> Result<()> {
        Ok(())
    }
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }
    fn end_ram(&mut self, _: Option<Synced<'_>>) -> Result<()> {
        Ok(())
    }
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn send_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn bytes(&self) -> u64 {
        0
    }
}

/// [`RAM`] in a file from `offset` on, with no page present.
fn in_file(file: &Arc<File>, offset: u64, direct: bool) -> Arc<RamBlocks> {
    let direct = direct.then(|| Arc::new(DirectFile::of(file).expect("direct I/O")));
    let mut at = offset;
    let blocks = RAM.iter().map(|(text, length)| {
        let places = Places::new(file.clone(), at, PageBitmap::new(length / 4096));
        let memory = Memory::MappedRam(places.past_cache(direct.clone()));
        at += length;
        RamBlock::new(name(text), *length, PageSize::KIB_4, memory).expect("a block")
    });
    let blocks = Arc::new(RamBlocks::new(blocks.collect()).expect("distinct"));
    // A file that was opened for reading is not changed.
    let _ = file.set_len(at);
    blocks
}

fn copy(
    source: &Arc<RamBlocks>,
    target: &Arc<RamBlocks>,
    detection: ZeroPageDetection,
    log: &mut dyn DirtyLog,
    guest: &mut StoppedGuest,
) -> Result<MigrationInfo> {
    let stop = Stop::new();
    let mut sender = Sender::new(SendOptions::new().channels(3), source.clone(), stop.clone())?;
    sender.set_up_into(target.clone())?;
    let options = MigrateOptions::new().zero_page_detection(detection);
    Migration::new(options, sender).expect("options").run(&mut Quiet(target), log, guest)
}

fn copy_plainly(source: &Arc<RamBlocks>, target: &Arc<RamBlocks>) -> Result<MigrationInfo> {
    let detection = ZeroPageDetection::Multifd;
    copy(source, target, detection, &mut NeverDirty, &mut StoppedGuest::default())
}

/// Every third page is zero, and a stretch of 2 MiB.
fn fill(blocks: &RamBlocks) {
    for (index, block) in blocks.iter() {
        for page in (0..block.pages()).filter(|page| page % 3 != 0 && !(1024..1536).contains(page)) {
            write(blocks, index.0, page, 1);
        }
    }
}

/// The available kinds of files: on a disk, or in the temporary folder; in memory.
fn files() -> Vec<File> {
    let folders = [env!("CARGO_MANIFEST_DIR").into(), std::env::temp_dir(), "/dev/shm".into()];
    folders.iter().filter_map(|folder: &std::path::PathBuf| tempfile::tempfile_in(folder).ok()).collect()
}

#[test]
fn ram_goes_into_a_file_and_comes_back_equal() {
    let source = fresh(PageSize::KIB_4, RAM);
    fill(&source);
    let detections = [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd];
    for file in files().into_iter().map(Arc::new) {
        for (detection, offset) in detections.into_iter().zip([OFFSET, 12345, OFFSET]) {
            file.set_len(0).expect("empty");
            let stored = in_file(&file, offset, false);
            let info = copy(&source, &stored, detection, &mut NeverDirty, &mut StoppedGuest::default());
            let pages = RAM.iter().map(|(_, length)| length / PAGE).sum::<u64>();
            let ram = info.expect("captured").ram;
            assert_eq!(ram.normal + ram.duplicate, pages);
            // Memory with any contents gets the contents of the file; page 3 is zero.
            let target = fresh(PageSize::KIB_4, RAM);
            for _ in 0..2 {
                write(&target, 0, 3, 9);
                copy_plainly(&stored, &target).expect("restored");
                assert_eq!(difference(&source, &target), None, "{detection:?}");
            }
        }
    }
}

#[test]
fn direct_io_moves_what_is_aligned_and_the_cache_what_is_not() {
    let source = fresh(PageSize::KIB_4, RAM);
    fill(&source);
    for offset in [OFFSET, 12345] {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        if DirectFile::of(&file).is_err() {
            return lacks("the folder for temporary files has no direct I/O");
        }
        let stored = in_file(&file, offset, true);
        copy_plainly(&source, &stored).expect("captured");
        let target = fresh(PageSize::KIB_4, RAM);
        copy_plainly(&stored, &target).expect("restored");
        assert_eq!(difference(&source, &target), None, "offset {offset}");
    }
}

#[test]
fn zero_pages_leave_holes_and_lose_their_bits() {
    let file = Arc::new(tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file"));
    let (source, stored) = (fresh(PageSize::KIB_4, RAM), in_file(&file, OFFSET, false));
    write(&source, 0, 7, 1);
    write(&source, 1, 2, 1);
    copy_plainly(&source, &stored).expect("captured");
    let present: Vec<u32> =
        stored.iter().map(|(_, block)| block.present_words().map(u64::count_ones).sum::<u32>()).collect();
    assert_eq!(present, [1, 1]);
    // In blocks of 512 bytes, including those of the file system itself.
    assert!(file.metadata().expect("its size").blocks() < (1 << 20) / 512, "holes");

    // A page that is zero in a later pass is zero in the file, regardless of its bytes there.
    source.block(BlockIndex(0)).expect("there").clear(PageIndex(7));
    copy_plainly(&source, &stored).expect("captured once more");
    assert!(!stored.block(BlockIndex(0)).expect("there").is_present(PageIndex(7)));
}

/// A page written after the one before it: the log reports it, and the file has the last version.
#[test]
fn guest_that_writes_meanwhile_is_captured_as_it_was_when_it_stopped() {
    struct Busy {
        halt: Arc<AtomicBool>,
        writer: Option<thread::JoinHandle<()>>,
    }
    impl multifd::live::Guest for Busy {
        fn devices(&self) -> Vec<DeviceInfo> {
            Vec::new()
        }
        fn run_state(&mut self) -> RunState {
            RunState::Running
        }
        fn stop(&mut self) -> std::io::Result<()> {
            self.halt.store(true, Ordering::Relaxed);
            self.writer.take().expect("once").join().expect("no panic");
            Ok(())
        }
        fn save(&mut self) -> std::io::Result<Vec<DeviceSection>> {
            Ok(Vec::new())
        }
        fn resume(&mut self) {}
    }
    let source = fresh(PageSize::KIB_4, RAM);
    fill(&source);
    let bits = DirtyBitmaps::new(&source);
    let mut log = bits.reader().expect("alone");
    let halt = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let (source, writes, halt) = (source.clone(), bits.clone(), halt.clone());
        move || {
            let (mut version, mut random) = (2, 7_u64);
            while !halt.load(Ordering::Relaxed) {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let page = (random >> 33) % (RAM[0].1 / PAGE);
                if version % 4 == 0 {
                    source
                        .block(BlockIndex(0))
                        .expect("there")
                        .slice(PageIndex(page), 1)
                        .expect("there")
                        .clear();
                } else {
                    write(&source, 0, page, version & 0xffff);
                }
                writes.mark(BlockIndex(0), PageIndex(page));
                version += 1;
            }
        }
    });
    let file = Arc::new(tempfile::tempfile().expect("a file"));
    let stored = in_file(&file, OFFSET, false);
    let stop = Stop::new();
    let mut sender =
        Sender::new(SendOptions::new().channels(4), source.clone(), stop.clone()).expect("a sender");
    sender.set_up_into(stored.clone()).expect("set up");
    // It is slow enough for at least a second pass.
    let options = MigrateOptions::new()
        .zero_page_detection(ZeroPageDetection::Multifd)
        .max_bandwidth(Some(200 << 20))
        .downtime_limit(std::time::Duration::from_millis(200));
    let migration = Migration::new(options, sender).expect("options");
    let mut guest = Busy { halt, writer: Some(writer) };
    let info = migration.run(&mut Quiet(&stored), &mut log, &mut guest).expect("captured");
    assert!(info.ram.normal + info.ram.duplicate > RAM[0].1 / PAGE, "more than one pass: {info:?}");
    let target = fresh(PageSize::KIB_4, RAM);
    copy_plainly(&stored, &target).expect("restored");
    assert_eq!(difference(&source, &target), None);
}

#[test]
fn what_cannot_be_copied_is_refused() {
    let refused = |options: SendOptions, source: &Arc<RamBlocks>, target: &Arc<RamBlocks>| {
        let mut sender = Sender::new(options, source.clone(), Stop::new()).expect("a sender");
        sender.set_up_into(target.clone()).expect_err("refused").to_string()
    };
    let (ram, file) = (fresh(PageSize::KIB_4, RAM), Arc::new(tempfile::tempfile().expect("a file")));
    let stored = in_file(&file, OFFSET, false);
    let told = refused(SendOptions::new().zero_copy_send(true), &ram, &stored);
    assert!(told.starts_with("zero-copy-send can only be used with connections"), "{told}");
    #[cfg(feature = "zlib")]
    {
        let told = refused(SendOptions::new().method(multifd::Method::Zlib), &ram, &stored);
        assert!(told.starts_with("multifd-compression can only be used with connections"), "{told}");
    }
    let plain = SendOptions::new;
    let others = fresh(PageSize::KIB_4, &[("pc.ram", 20 << 20)]);
    let shorter = fresh(PageSize::KIB_4, &[("pc.ram", PAGE), ("pc.rom", 3 * PAGE)]);
    let coarser = fresh(PageSize::KIB_16, &[("pc.ram", 20 << 20), ("pc.rom", 48 << 10)]);
    for (source, target, expected) in [
        (&ram, &fresh(PageSize::KIB_4, RAM), r#"block "pc.ram" cannot be copied: both sides are in memory"#),
        (&stored, &stored, r#"block "pc.ram" cannot be copied: both sides are in files"#),
        (&stored, &others, r#"block "pc.rom" cannot be copied: the target has no such block"#),
        (&others, &stored, r#"block "pc.rom" cannot be copied: the source has no such block"#),
        (&stored, &shorter, "expected 0x1400000 bytes in the target, found 0x1000"),
        (&stored, &coarser, "expected pages of 4 KiB in the target, found 16 KiB"),
    ] {
        let told = refused(plain(), source, target);
        assert!(told.contains(expected), "{told}");
    }
    let mapping = Mapping::of_file(&file, 0, 20 << 20, Access::Read).expect("mapped");
    let block =
        RamBlock::new(name("pc.ram"), 20 << 20, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block");
    let only = |file: &Arc<File>| {
        let memory = Memory::MappedRam(Places::new(file.clone(), 0, PageBitmap::new(5 << 10)));
        let block = RamBlock::new(name("pc.ram"), 20 << 20, PageSize::KIB_4, memory).expect("a block");
        Arc::new(RamBlocks::new(vec![block]).expect("one"))
    };
    let read_only = Arc::new(RamBlocks::new(vec![block]).expect("one"));
    let told = refused(plain(), &only(&file), &read_only);
    assert!(told.contains("the target is mapped for reading only"), "{told}");

    let mut sender = Sender::new(plain(), ram.clone(), Stop::new()).expect("a sender");
    sender.set_up_into(stored.clone()).expect("set up");
    let twice = sender.set_up_into(stored).expect_err("twice");
    assert!(matches!(twice, Error::Usage(Usage::UsedTwice)), "{twice}");
}

#[test]
fn file_that_cannot_be_written_is_an_error_and_the_guest_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("ram");
    File::create(&path).expect("a file").set_len(64 << 20).expect("sized");
    let file = Arc::new(OpenOptions::new().read(true).open(path).expect("for reading"));
    let (source, stored) = (fresh(PageSize::KIB_4, RAM), in_file(&file, OFFSET, false));
    fill(&source);
    let mut guest = StoppedGuest::default();
    let bits = DirtyBitmaps::new(&source);
    let mut log = bits.reader().expect("alone");
    let told = copy(&source, &stored, ZeroPageDetection::Multifd, &mut log, &mut guest).expect_err("refused");
    assert!(told.to_string().contains(r#"write block "pc.ram" at offset 0x"#), "{told}");
    assert_eq!(bits.count(BlockIndex(0)), RAM[0].1 / PAGE, "all pages are dirty again");
}

#[test]
fn file_that_is_cut_is_an_error_that_names_block_and_offset() {
    let file = Arc::new(tempfile::tempfile().expect("a file"));
    let (source, stored) = (fresh(PageSize::KIB_4, RAM), in_file(&file, OFFSET, false));
    fill(&source);
    copy_plainly(&source, &stored).expect("captured");
    file.set_len(9 << 20).expect("cut");
    let told = copy_plainly(&stored, &fresh(PageSize::KIB_4, RAM)).expect_err("cut");
    assert!(told.to_string().contains(r#"read block "pc.ram" at offset 0x"#), "{told}");
    let cause = std::error::Error::source(&told).expect("a cause").to_string();
    assert!(cause.starts_with("the file ends there"), "{cause}");
}

/// Guest memory that is a file, and was truncated: an error of the call that reads it, not a signal.
#[test]
fn memory_that_is_cut_is_an_error_that_names_block_and_offset() {
    let memory = tempfile::tempfile().expect("a file");
    memory.write_all_at(&vec![1; 4 << 20], 0).expect("filled");
    let mapping = Mapping::of_file(&memory, 0, 4 << 20, Access::ReadWrite).expect("mapped");
    let block = |memory| RamBlock::new(name("ram"), 4 << 20, PageSize::KIB_4, memory).expect("a block");
    let source = Arc::new(RamBlocks::new(vec![block(Memory::Mapped(mapping))]).expect("one"));
    memory.set_len(1 << 20).expect("cut");
    let file = Arc::new(tempfile::tempfile().expect("a file"));
    let places = Places::new(file, 0, PageBitmap::new(1 << 10));
    let stored = Arc::new(RamBlocks::new(vec![block(Memory::MappedRam(places))]).expect("one"));
    let none = ZeroPageDetection::None;
    let told = copy(&source, &stored, none, &mut NeverDirty, &mut StoppedGuest::default()).expect_err("cut");
    assert!(told.to_string().contains(r#"read block "ram" at offset 0x0"#), "{told}");
}

#[test]
fn cancel_ends_a_copy_at_once() {
    let (source, file) = (fresh(PageSize::KIB_4, RAM), Arc::new(tempfile::tempfile().expect("a file")));
    fill(&source);
    let stop = Stop::new();
    let mut sender = Sender::new(SendOptions::new(), source.clone(), stop.clone()).expect("a sender");
    sender.set_up_into(in_file(&file, OFFSET, false)).expect("set up");
    sender.queue_run(BlockIndex(0), PageIndex(0), 100).expect("queued");
    stop.cancel();
    assert!(sender.sync().expect_err("cancelled").is_cancelled());
    assert!(sender.finish().expect_err("cancelled").is_cancelled());
}

/// Run once more in a file system of 8 MiB.
#[test]
fn full_file_system_is_an_error_that_names_block_and_offset() {
    if let Some(folder) = std::env::var_os(SMALL) {
        let file = Arc::new(tempfile::tempfile_in(folder).expect("a file"));
        let (source, stored) = (fresh(PageSize::KIB_4, RAM), in_file(&file, OFFSET, false));
        fill(&source);
        let told = copy_plainly(&source, &stored).expect_err("full");
        assert!(told.to_string().contains(r#"write block "pc.ram" at offset 0x"#), "{told}");
        let cause = std::error::Error::source(&told).expect("a cause").to_string();
        assert!(cause.starts_with("No space left on device"), "{cause}");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
    command.arg(format!("mount -t tmpfs -o size=8M none \"${SMALL}\" || exit 77; exec \"$0\" \"$@\""));
    command.arg(std::env::current_exe().expect("this program"));
    command.args(["--exact", "copies::full_file_system_is_an_error_that_names_block_and_offset"]);
    let output = match command.env(SMALL, folder.path()).output() {
        Ok(output) if output.status.success() || output.status.code() == Some(101) => output,
        _ => return lacks("no user namespace to mount a file system in"),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the test was found");
}

const SMALL: &str = "MULTIFD_TEST_SMALL";
