//! `multifd inspect --extract`: the RAM of one block.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use multifd::ram::{BlockIndex, BlockName, PageSize};
use qemu_stream::{
    format::{BlockEntry, BlockList, Configuration, DevicePart, MachineType, SectionId},
    mapped_ram::{Layout, MappedRamFile, Shape, Tail},
};
use tempfile::TempDir;

use crate::kit::{
    Ended, Program, assert_left, captured, folder, multifd, multifd_in, path, run, stored_memory,
};

const MIB: u64 = 1 << 20;

fn extract(options: &[&str], block: &str, file: &Path, out: &Path) -> Ended {
    let mut command = multifd(["inspect", "--extract", block]);
    Program::start(command.args(options).arg(file).arg(out)).end()
}

/// A machine of which only the first MiB of each four is present; there is garbage instead of the rest.
fn sparse(folder: &TempDir, bytes: u64) -> PathBuf {
    let path = captured(folder, bytes);
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let place = *MappedRamFile::open(file.try_clone().unwrap(), 0).unwrap().place(BlockIndex(0)).unwrap();
    let present = |byte: u64| if (byte / 32).is_multiple_of(4) { 0xff } else { 0 };
    let bits: Vec<u8> = (0..place.pages() / 8).map(present).collect();
    file.write_all_at(&bits, place.bitmap_offset).unwrap();
    path
}

#[test]
fn extracted_block_is_its_ram_with_holes_and_its_owners_alone() {
    let folder = folder();
    let (file, out) = (sparse(&folder, 32 * MIB), path(&folder, "out"));
    let ended = extract(&[], "pc.ram", &file, &out);
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(0), "", ""), "{ended:?}");
    assert!(fs::read(&out).unwrap() == stored_memory(&file), "the RAM and nothing else");
    let out = fs::metadata(&out).unwrap();
    assert_eq!(out.permissions().mode() & 0o777, 0o600);
    assert!(out.blocks() * 512 <= 9 * MIB, "{} bytes of 8 MiB take room", out.blocks() * 512);
    assert_left(&folder, &["captured", "out"]);
}

/// Not every system copies between file systems itself.
#[test]
fn block_is_extracted_into_another_file_system() {
    let (here, there) = (folder(), tempfile::tempdir_in("/dev/shm").unwrap());
    let (file, out) = (sparse(&here, 16 * MIB), path(&there, "out"));
    assert_eq!(extract(&[], "pc.ram", &file, &out).code, Some(0));
    assert!(fs::read(&out).unwrap() == stored_memory(&file), "the RAM and nothing else");
}

#[test]
fn block_goes_to_standard_output_with_its_zeros() {
    let folder = folder();
    let file = sparse(&folder, 16 * MIB);
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = multifd(["inspect", "--extract", "pc.ram"]);
    let program = Program::start_with_output(command.arg(&file).arg("-"), writer);
    drop(command);
    let mut found = Vec::new();
    reader.read_to_end(&mut found).unwrap();
    program.done();
    assert!(found == stored_memory(&file), "the RAM and nothing else");
    assert_left(&folder, &["captured"]);
}

#[test]
fn existing_file_is_replaced_with_force_alone() {
    let folder = folder();
    let (file, out) = (captured(&folder, MIB), path(&folder, "out"));
    fs::write(&out, "precious").unwrap();
    extract(&[], "pc.ram", &file, &out).assert_failed(1, &["cannot create", "out", "--force"]);
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    assert_eq!(extract(&["--force"], "pc.ram", &file, &out).code, Some(0));
    assert!(fs::read(&out).unwrap() == stored_memory(&file), "the RAM and nothing else");
    assert_left(&folder, &["captured", "out"]);
}

#[test]
fn device_in_place_of_the_file_is_left_alone() {
    let folder = folder();
    let file = captured(&folder, MIB);
    let ended = extract(&["--force"], "pc.ram", &file, Path::new("/dev/null"));
    ended.assert_failed(1, &["cannot create /dev/null", "not a regular file"]);
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
}

#[test]
fn unknown_block_is_an_error_that_names_those_there_are() {
    let folder = folder();
    let ended = extract(&[], "pc.rom", &captured(&folder, MIB), &path(&folder, "out"));
    ended.assert_failed(1, &["no such block", "expected one of pc.ram, found pc.rom"]);
    assert_left(&folder, &["captured"]);
}

/// Regression: zeros were written instead, as if the guest had no other memory.
#[test]
fn block_whose_memory_is_shared_is_refused_with_the_reason() {
    let folder = folder();
    let (file, out) = (path(&folder, "machine"), path(&folder, "out"));
    let shared =
        Configuration { ignore_shared: true, ..Configuration::new(MachineType::new("pc-q35-10.0").unwrap()) };
    let entry = |name, address| BlockEntry {
        address: Some(address),
        ..BlockEntry::new(BlockName::new(name).unwrap(), MIB)
    };
    let blocks = vec![entry("ram", 0), entry("pc.bios", 0xfffc_0000)];
    let blocks = BlockList::new(blocks, PageSize::KIB_4).unwrap();
    let shape = Shape {
        configuration: Some(&shared),
        section: SectionId(1),
        offset: 0,
        footers: true,
        ignored: &[BlockIndex(0)],
        sync_mode: None,
    };
    let layout = Layout::of(&shape, &blocks).unwrap();
    let devices = DevicePart::build(&[], 4096, SectionId(2)).unwrap();
    let written = fs::File::create_new(&file).unwrap();
    let tail = Tail { switchover_start: true, devices: &devices, about: None, base: None };
    layout.write(&written, &tail, |_, _| vec![0; 4]).unwrap();
    for to in [&out, Path::new("-")] {
        let ended = extract(&[], "ram", &file, to);
        ended.assert_failed(1, &["cannot extract block ram of ", "x-ignore-shared", "left out", "copy"]);
        assert_eq!(ended.stdout, "");
    }
    assert_left(&folder, &["machine"]);
    assert_eq!(extract(&[], "pc.bios", &file, &out).code, Some(0));
    assert!(fs::read(&out).unwrap() == vec![0; 1 << 20], "its zeros");
}

#[test]
fn options_of_an_extract_need_one() {
    for arguments in [
        &["inspect", "file", "out"][..],
        &["inspect", "--force", "file"],
        &["inspect", "--extract", "pc.ram", "file"],
        &["inspect", "--extract", "pc.ram", "--json", "file", "out"],
    ] {
        run(arguments).assert_failed(2, &["--extract"]);
    }
}

#[test]
fn disk_that_is_full_is_an_error_and_leaves_nothing() {
    let folder = folder();
    let (file, out) = (captured(&folder, 8 * MIB), path(&folder, "out"));
    let arguments =
        ["inspect", "--extract", "pc.ram", &file.display().to_string(), &out.display().to_string()];
    // In units of 512 bytes: 4 MiB.
    let ended = Program::start(&mut multifd_in(&[], "ulimit -f 8192", &arguments)).end();
    ended.assert_failed(1, &["cannot extract block pc.ram", "because: "]);
    assert_left(&folder, &["captured"]);
}

#[test]
fn file_that_is_cut_in_the_middle_is_an_error() {
    let folder = folder();
    let file = captured(&folder, 16 * MIB);
    let (mut reader, writer) = io::pipe().unwrap();
    let mut command = multifd(["inspect", "--extract", "pc.ram"]);
    let program = Program::start_with_output(command.arg(&file).arg("-"), writer);
    drop(command);
    // It has begun, and cannot continue while nobody reads.
    reader.read_exact(&mut [0]).unwrap();
    fs::File::options().write(true).open(&file).unwrap().set_len(6 * MIB).unwrap();
    let mut found = Vec::new();
    reader.read_to_end(&mut found).unwrap();
    let told = [
        "cannot extract block pc.ram into standard output",
        "cannot copy the block at offset 0x",
        "made it shorter",
    ];
    program.end().assert_failed(1, &told);
    assert!((found.len() as u64) < 16 * MIB, "{} bytes", found.len());
}
