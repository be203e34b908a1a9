//! Machines directly between memory and a file.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use multifd::{
    Error, Result, SendOptions, Sender,
    channel::Stop,
    live::{
        DeviceInfo, DeviceName, DeviceSection, Guest, MigrateOptions, Migration, MigrationInfo, RunState,
        ZeroPageDetection,
    },
    ram::{Access, BlockName, Mapping, Memory, NeverDirty, PageIndex, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    format::{BlockIndex, Configuration, MachineType},
    mapped_ram::{Capture, CaptureOptions, MappedRamFile, Restore},
};

const RAM: &[(&str, u64)] = &[("ram", 12 << 20), ("rom", 0x3000)];

fn memory() -> Arc<RamBlocks> {
    let block = |(name, length): &(&str, u64)| {
        let memory = Memory::Mapped(Mapping::anonymous(*length).expect("memory"));
        RamBlock::new(BlockName::new(*name).expect("a name"), *length, PageSize::KIB_4, memory)
            .expect("a block")
    };
    Arc::new(RamBlocks::new(RAM.iter().map(block).collect()).expect("distinct"))
}

/// Every fifth page is not written.
pub(crate) fn filled() -> Arc<RamBlocks> {
    let blocks = memory();
    for (index, block) in blocks.iter() {
        for page in (0..block.pages()).filter(|page| page % 5 != 0) {
            let word = (index.0 as u64 + 1) << 32 | page;
            block.store(PageIndex(page), &word.to_be_bytes().repeat(512)).expect("stored");
        }
    }
    blocks
}

fn bytes(blocks: &RamBlocks) -> Vec<u8> {
    let mut all = Vec::new();
    for (_, block) in blocks.iter() {
        let slice = block.slice(PageIndex(0), block.pages()).expect("mapped");
        let mut bytes = vec![0; slice.len()];
        slice.copy_to(&mut bytes);
        all.extend(bytes);
    }
    all
}

/// A guest with one device, which records whether it was resumed.
#[derive(Default)]
pub(crate) struct Stopped(bool);

const VCPU: DeviceName = DeviceName::from_static("vcpu");

impl Guest for Stopped {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(VCPU, 99).instance(3)]
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(vec![DeviceSection { name: VCPU, instance_id: 3, version: 2, data: vec![7; 99] }])
    }
    fn resume(&mut self) {
        self.0 = true;
    }
}

pub(crate) fn configuration() -> Configuration {
    Configuration::new(MachineType::new("my-vmm-1").expect("a name"))
}

/// Runs the capture of these blocks over this number of channels; 0 means over main.
fn run(
    mut capture: Capture,
    blocks: &Arc<RamBlocks>,
    channels: u8,
    detection: ZeroPageDetection,
) -> Result<MigrationInfo> {
    let stop = Stop::new();
    let sender = (channels > 0).then(|| {
        let options = SendOptions::new().channels(channels);
        let mut sender = Sender::new(options, blocks.clone(), stop.clone()).expect("a sender");
        sender.set_up_into(capture.blocks().clone()).expect("set up");
        sender
    });
    let options = MigrateOptions::new().zero_page_detection(detection);
    let migration = match sender {
        Some(sender) => Migration::new(options, sender),
        None => Migration::over_main(options, blocks.clone(), stop),
    };
    let mut guest = Stopped::default();
    let info = migration.and_then(|migration| migration.run(&mut capture, &mut NeverDirty, &mut guest));
    assert_eq!(guest.0, info.is_err(), "it goes on if the capture fails, and only then");
    info
}

/// The file after a capture of these blocks.
fn captured(source: &Arc<RamBlocks>) -> MappedRamFile {
    let file = tempfile::tempfile().expect("a file");
    let read = file.try_clone().expect("a descriptor");
    let capture = Capture::of_guest(file, configuration(), source, &CaptureOptions::new()).expect("laid out");
    run(capture, source, 2, ZeroPageDetection::Multifd).expect("captured");
    MappedRamFile::open(read, 0).expect("whole")
}

fn restored(machine: &MappedRamFile, channels: u8) -> Arc<RamBlocks> {
    let blocks = memory();
    Restore::new(machine).channels(channels).run(&blocks, &Stop::new()).expect("restored");
    blocks
}

#[test]
fn machine_comes_back_with_its_devices_however_it_was_captured() {
    let source = filled();
    let all = [
        (0, ZeroPageDetection::Legacy, CaptureOptions::new()),
        (1, ZeroPageDetection::Legacy, CaptureOptions::new().durable(true)),
        (4, ZeroPageDetection::Multifd, CaptureOptions::new().offset(0x1234)),
        (3, ZeroPageDetection::None, CaptureOptions::new().durable(true).direct_io(false)),
        (2, ZeroPageDetection::Multifd, CaptureOptions::new().direct_io(true)),
    ];
    for (channels, detection, options) in all {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(b"head", 0).expect("written");
        let read = file.try_clone().expect("a descriptor");
        let offset = if channels == 4 { 0x1234 } else { 0 };
        let capture = Capture::of_guest(file, configuration(), &source, &options).expect("laid out");
        run(capture, &source, channels, detection).expect("captured");
        let machine = MappedRamFile::open(read, offset).expect("whole");
        let section = &machine.devices().sections()[0];
        assert_eq!((section.name.to_string().as_str(), section.instance, section.version), ("vcpu", 3, 2));
        assert_eq!(machine.devices().body(section), Some(&[7; 99][..]));
        assert!(bytes(&source) == bytes(&restored(&machine, 3)), "{channels} channels, {options:?}");
        let mut head = [0; 4];
        machine.file().read_exact_at(&mut head, 0).expect("there");
        assert_eq!(&head == b"head", offset > 0);
    }
}

#[test]
fn machine_of_a_file_is_captured_again_as_it_came() {
    let source = filled();
    let machine = captured(&source);

    // In a different order than in the file.
    let mut blocks: Vec<RamBlock> =
        Arc::into_inner(restored(&machine, 2)).expect("ours").into_iter().collect();
    blocks.reverse();
    let blocks = Arc::new(RamBlocks::new(blocks).expect("distinct"));
    for channels in [0, 2] {
        let second = tempfile::tempfile().expect("a file");
        let read = second.try_clone().expect("a descriptor");
        let capture = Capture::of_machine(second, &machine, &CaptureOptions::new()).expect("laid out");
        run(capture, &blocks, channels, ZeroPageDetection::Legacy).expect("captured again");
        let again = MappedRamFile::open(read, 0).expect("whole");
        assert_eq!(again.devices(), machine.devices());
        assert_eq!(again.blocks(), machine.blocks());
        for (index, _) in machine.blocks().iter() {
            let words = |file: &MappedRamFile| file.bitmap(index).expect("read").words().collect::<Vec<_>>();
            assert_eq!(words(&again), words(&machine));
        }
        assert!(bytes(&source) == bytes(&restored(&again, 1)));
    }
}

/// Regression: a capture made the system allocate every page of a shared memory, and so did a restore.
#[test]
fn sparse_shared_memory_is_as_sparse_after_its_capture_and_its_restore() {
    let make = || {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(file);
        file.set_len(12 << 20).expect("sized");
        // Over main, pages are copied, which is refused for a file that may be truncated.
        let mapping =
            Mapping::of_file(&file, 0, 12 << 20, Access::ReadWrite).expect("mapped").never_shrinks();
        let (name, length) = (BlockName::new("ram").expect("a name"), mapping.len());
        let block = RamBlock::new(name, length, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block");
        (file, Arc::new(RamBlocks::new(vec![block]).expect("one")))
    };
    let allocated =
        |file: &File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("known")) / 8;
    for (channels, detection) in
        [(2, ZeroPageDetection::Multifd), (0, ZeroPageDetection::Legacy), (3, ZeroPageDetection::Legacy)]
    {
        let (memory, source) = make();
        for page in [3, 4, 2000] {
            source.iter().for_each(|(_, ram)| ram.store(PageIndex(page), &[7; 4096]).expect("stored"));
        }
        let file = tempfile::tempfile().expect("a file");
        let read = file.try_clone().expect("a descriptor");
        let capture =
            Capture::of_guest(file, configuration(), &source, &CaptureOptions::new()).expect("laid out");
        let info = run(capture, &source, channels, detection).expect("captured");
        assert_eq!((info.ram.normal, allocated(&memory)), (3, 3), "{channels} channels, {detection:?}");
        let (restored, blocks) = make();
        let machine = MappedRamFile::open(read, 0).expect("whole");
        Restore::new(&machine).run(&blocks, &Stop::new()).expect("restored");
        assert_eq!(allocated(&restored), 3, "{channels} channels, {detection:?}");
        assert!(bytes(&source) == bytes(&blocks));
    }
}

/// Regression: the restore ended the process by SIGSEGV.
#[test]
fn restore_into_memory_without_access_is_refused_unless_it_is_zero_on_both_sides() {
    use rustix::mm::{MprotectFlags, mprotect};

    let machine = captured(&filled());
    for (length, is_refused) in [(0x1000, false), (0x2000, true)] {
        let blocks = memory();
        let rom = blocks.iter().nth(1).expect("there").1;
        let slice = rom.slice(PageIndex(0), length as u64 / 4096).expect("there");
        // SAFETY: the range lies within a mapping of the test, which accesses it only after the rights are back.
        #[expect(unsafe_code, reason = "a hole in guest memory")]
        let protect = |rights| unsafe { mprotect(slice.as_ptr().cast(), slice.len(), rights) };
        protect(MprotectFlags::empty()).expect("protected");
        let restored = Restore::new(&machine).run(&blocks, &Stop::new());
        protect(MprotectFlags::READ | MprotectFlags::WRITE).expect("protected");
        assert_eq!(restored.is_err(), is_refused, "{restored:?}");
        if let Err(error) = restored {
            let expected = r#"block "rom": 0x1000 bytes from offset 0x1000 on are mapped without"#;
            assert!(error.to_string().contains(expected), "{error}");
        } else {
            assert!(bytes(&filled()) == bytes(&blocks));
        }
    }
}

/// An interrupted capture over an older one leaves neither machine.
#[test]
fn file_of_a_capture_that_was_broken_off_is_no_machine() {
    let (source, file) = (filled(), tempfile::tempfile().expect("a file"));
    let open = |file: &File| file.try_clone().expect("a descriptor");
    let begin =
        |file| Capture::of_guest(file, configuration(), &source, &CaptureOptions::new()).expect("laid out");
    run(begin(open(&file)), &source, 2, ZeroPageDetection::Multifd).expect("captured");
    MappedRamFile::open(open(&file), 0).expect("whole");
    drop(begin(open(&file)));
    MappedRamFile::open(open(&file), 0).expect_err("nothing in it counts");

    let stop = Stop::new();
    let mut sender = Sender::new(SendOptions::new(), source.clone(), stop.clone()).expect("a sender");
    let mut capture = begin(open(&file));
    sender.set_up_into(capture.blocks().clone()).expect("set up");
    let migration = Migration::new(MigrateOptions::new(), sender).expect("options");
    stop.cancel();
    let told = migration.run(&mut capture, &mut NeverDirty, &mut Stopped::default());
    assert!(told.expect_err("cancelled").is_cancelled());
    MappedRamFile::open(open(&file), 0).expect_err("nothing in it counts");
}

#[test]
fn restore_into_other_blocks_and_one_that_is_cancelled_are_errors() {
    let machine = captured(&filled());

    let one: Vec<RamBlock> = Arc::into_inner(memory()).expect("ours").into_iter().take(1).collect();
    let one = Arc::new(RamBlocks::new(one).expect("one"));
    let told = Restore::new(&machine).run(&one, &Stop::new()).expect_err("refused");
    assert_eq!(told.to_string(), r#"block "rom" cannot be copied: the target has no such block"#);
    let told = Restore::new(&machine).channels(0).run(&memory(), &Stop::new()).expect_err("refused");
    assert!(matches!(told, Error::Usage(_)), "{told}");
    let stop = Stop::new();
    stop.cancel();
    assert!(Restore::new(&machine).run(&memory(), &stop).expect_err("cancelled").is_cancelled());

    // Truncated between the check and the restore: the bitmaps exist, and a page does not.
    let place = machine.place(BlockIndex(1)).expect("there");
    machine.file().set_len(place.pages_offset + 0x1000).expect("cut");
    let told = Restore::new(&machine).run(&memory(), &Stop::new()).expect_err("cut");
    assert!(told.to_string().contains(r#"read block "rom" at offset 0x1000"#), "{told}");
}
