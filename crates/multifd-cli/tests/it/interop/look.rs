//! What `read`, `find`, `export`, `diff` and `inspect --device` show of a guest, compared with what its QEMU shows.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use multifd_testkit::qemu::{Error, Qemu, Vm, VmBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::{Ended, PAGE, folder, machine, migrate, path, run, source};

/// Runs a verb with words before the file.
pub(super) fn look(verb: &str, words: &[&str], file: &Path) -> Ended {
    let mut command = vec![verb];
    command.extend(words);
    command.push(file.to_str().expect("text"));
    run(command)
}

/// The memory that `read` shows.
pub(super) fn read(words: &[&str], file: &Path, address: u64, length: u64) -> Vec<u8> {
    let (address, length) = (format!("{address:#x}"), length.to_string());
    let mut command = crate::kit::multifd(["read", "--raw", "--gpa", &address, "--len", &length]);
    let output = command.args(words).arg(file).output().expect("started");
    assert!(output.status.success(), "{address}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A stopped machine, its stream in a file, and QEMU's own dump of its memory.
pub(super) struct Dumped {
    pub(super) vm: Vm,
    pub(super) stream: std::path::PathBuf,
    dump: std::path::PathBuf,
    pub(super) folder: TempDir,
}

pub(super) fn dumped(builder: VmBuilder, runs: bool) -> Result<Dumped, Error> {
    let folder = folder();
    let mut vm = if runs { source(builder)? } else { builder.paused().start()? };
    vm.stop()?;
    let dump = path(&folder, "dump");
    vm.execute(
        "dump-guest-memory",
        json!({ "paging": false, "protocol": format!("file:{}", dump.display()) }),
    )?;
    let stream = path(&folder, "stream");
    migrate(&mut vm, &format!("exec:cat > {}", stream.display()))?;
    Ok(Dumped { vm, stream, dump, folder })
}

/// The segments and the notes of an ELF file.
struct Elf {
    file: File,
    machine: u16,
    /// Address, position, length.
    loads: Vec<(u64, u64, u64)>,
    /// Name, type, contents.
    notes: Vec<(String, u32, Vec<u8>)>,
}

impl Elf {
    fn open(path: &Path) -> Self {
        let file = File::open(path).expect("the file");
        let bytes = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at).expect("in the file");
            bytes
        };
        let is_little = bytes(5, 1) == [1];
        let number = |at: u64, length: usize| {
            let mut bytes = bytes(at, length);
            if is_little {
                bytes.reverse();
            }
            bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let (mut loads, mut notes) = (Vec::new(), Vec::new());
        for segment in 0..number(56, 2) {
            let at = number(32, 8) + segment * 56;
            let (position, address, length) = (number(at + 8, 8), number(at + 24, 8), number(at + 32, 8));
            if number(at, 4) == 1 {
                loads.push((address, position, length));
                continue;
            }
            let mut at = position;
            while at < position + length {
                let (name, contents) = (number(at, 4), number(at + 4, 4));
                let start = at + 12 + name.next_multiple_of(4);
                let text = bytes(at + 12, usize::try_from(name).expect("short"));
                notes.push((
                    String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned(),
                    u32::try_from(number(at + 8, 4)).expect("a type"),
                    bytes(start, usize::try_from(contents).expect("short")),
                ));
                at = start + contents.next_multiple_of(4);
            }
        }
        let machine = u16::try_from(number(18, 2)).expect("16 bits");
        Self { machine, loads, notes, file }
    }

    /// The registers of each processor, without the last number: whether there are more of them in other notes.
    fn statuses(&self) -> Vec<&[u8]> {
        let of_processors = self.notes.iter().filter(|note| note.0 == "CORE" && note.1 == 1);
        of_processors.map(|note| note.2.get(..note.2.len() - 8).expect("registers")).collect()
    }

    /// The first address at which two files that both have memory there differ.
    fn first_difference(&self, other: &Self) -> Option<u64> {
        let mut compared = 0;
        let pairs = self.loads.iter().flat_map(|one| other.loads.iter().map(move |two| (one, two)));
        for ((one_at, one_position, one_length), (two_at, two_position, two_length)) in pairs {
            let address = *one_at.max(two_at);
            let length = (one_at + one_length).min(two_at + two_length).saturating_sub(address);
            compared += length;
            let (mut one, mut two) = (vec![0; 1 << 20], vec![0; 1 << 20]);
            for at in (0..length).step_by(1 << 20) {
                let count = usize::try_from((length - at).min(1 << 20)).expect("small");
                let read = |file: &File, into: &mut [u8], position: u64| {
                    file.read_exact_at(&mut into[..count], position + at).expect("in the file");
                };
                read(&self.file, &mut one, one_position + (address - one_at));
                read(&other.file, &mut two, two_position + (address - two_at));
                let pages = (0..count).step_by(PAGE).map(|page| page..count.min(page + PAGE));
                for page in pages.filter(|page| one[page.clone()] != two[page.clone()]) {
                    let address = address + at + page.start as u64;
                    // There QEMU's file has firmware, and a processor sees RAM when that has started.
                    if self.machine == S390 || self.machine == PPC64 || !NOT_RAM.contains(&address) {
                        return Some(address);
                    }
                }
            }
        }
        assert!(compared > 0, "nothing was compared: {:x?}, {:x?}", self.loads, other.loads);
        None
    }
}

const S390: u16 = 22;
const PPC64: u16 = 21;
const NOT_RAM: std::ops::Range<u64> = 0xa_0000..0x10_0000;

/// `export --format elf` has the memory and the registers of QEMU's own dump.
fn like_qemus_dump(machine: VmBuilder, runs: bool, processors: usize) -> Result<(), Error> {
    let Dumped { vm: _vm, stream, dump, folder } = dumped(machine, runs)?;
    let ours = path(&folder, "ours");
    let ended =
        run(["export".as_ref(), "--format".as_ref(), "elf".as_ref(), stream.as_os_str(), ours.as_os_str()]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (ours, dump) = (Elf::open(&ours), Elf::open(&dump));
    assert_eq!(ours.first_difference(&dump), None, "address");
    // QEMU also has firmware in it.
    let ram = |elf: &Elf| -> Vec<_> {
        // Below 1 MiB it has a range for each piece that is not firmware.
        let ranges = elf.loads.iter().map(|load| (load.0.max(NOT_RAM.end), load.0 + load.2));
        ranges.filter(|range| range.1.saturating_sub(range.0) >= 4 << 20).collect()
    };
    assert_eq!(ram(&ours), ram(&dump), "ranges of RAM");
    if processors == 0 {
        return Ok(());
    }
    // A processor that is in 16 or 32 bits makes QEMU's file one of 32 bits.
    if ours.machine == dump.machine {
        assert_eq!(ours.statuses(), dump.statuses(), "registers");
    }
    let qemus = |elf: &Elf| -> Vec<_> { elf.notes.iter().filter(|note| note.0 == "QEMU").cloned().collect() };
    assert_eq!(qemus(&ours), qemus(&dump), "registers");
    assert_eq!(ours.statuses().len(), processors);
    Ok(())
}

#[test]
fn exported_memory_and_registers_are_those_of_qemus_own_dump_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    like_qemus_dump(machine(&qemu, &qemu.machine()).args(["-smp", "2"]), true, 2).unwrap();
}

#[test]
fn exported_memory_and_registers_are_those_of_qemus_own_dump_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    like_qemus_dump(machine(&qemu, &qemu.machine()).args(["-smp", "2"]), true, 2).unwrap();
}

/// The hole below 4 GiB is where QEMU has it, for each machine type and size. The machines have not run; a device has written one
/// number at each end of each range.
#[test]
fn ram_is_where_qemu_has_it() {
    fn compares(qemu: &Qemu, machine: &str, mib: u64, low: u64) -> Result<(), Error> {
        let high = (mib << 20).saturating_sub(low);
        let low = low.min(mib << 20);
        let mut expected = vec![(0, low)];
        if high > 0 {
            expected.push((1 << 32, high));
        }
        let mut vm = qemu.vm().machine(machine).memory(mib << 20).paused();
        // Not at 0, where processors have tables.
        let ends = expected.iter().flat_map(|(start, length)| [start + (2 << 20), start + length - 8]);
        let ends: Vec<u64> = ends.collect();
        for address in &ends {
            vm = vm.args([
                "-device".to_owned(),
                format!("loader,addr={address:#x},data={address:#x},data-len=8"),
            ]);
        }
        let mut vm = vm.start()?;
        let tree = vm.execute("human-monitor-command", json!({ "command-line": "info mtree -f" }))?;
        let folder = folder();
        let stream = path(&folder, "stream");
        migrate(&mut vm, &format!("exec:cat > {}", stream.display()))?;
        for address in ends {
            let seen = vm.pmemsave(address, 8)?;
            assert_eq!(
                seen.iter().rev().copied().collect::<Vec<_>>(),
                address.to_be_bytes(),
                "{machine} {mib}: {address:#x}"
            );
            assert_eq!(read(&[], &stream, address, 8), seen, "{machine} {mib}: {address:#x}");
        }
        let ours = path(&folder, "ours");
        let ended = look("export", &["--format", "elf", stream.to_str().expect("text")], &ours);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let loads: Vec<_> = Elf::open(&ours).loads.iter().map(|load| (load.0, load.2)).collect();
        assert_eq!(loads, expected, "{machine} {mib}");
        for (start, length) in expected {
            let line = format!("-{:016x} (prio 0, ram): ", start + length - 1);
            let tree = tree.as_str().expect("text");
            assert!(tree.contains(&line), "{machine} {mib}: {line}{tree}");
        }
        Ok(())
    }
    let Some(qemu) = Qemu::v7_2() else { return };
    let (two, three) = (2 << 30, 3 << 30);
    for (machine, mib, low) in [
        ("pc-q35-7.2", 2815, u64::MAX),
        ("pc-q35-7.2", 2816, two),
        ("pc-q35-7.2,max-ram-below-4g=1G", 2048, 1 << 30),
        ("pc-q35-2.4", 4096, two),
        ("pc-i440fx-7.2", 3583, u64::MAX),
        ("pc-i440fx-7.2", 3584, three),
        ("pc-i440fx-1.7", 4096, 0xe000_0000),
        ("microvm", 3584, three),
    ] {
        compares(&qemu, machine, mib, low).unwrap_or_else(|error| panic!("{machine} {mib}: {error:?}"));
    }
}

#[test]
fn ram_and_registers_of_other_architectures_are_where_qemu_has_them() {
    let Some(x86) = Qemu::v10_0() else { return };
    for (program, machine, options, processors) in [
        ("qemu-system-aarch64", "virt-10.0", &["-cpu", "max", "-smp", "2"][..], 2),
        ("qemu-system-s390x", "s390-ccw-virtio-10.0", &["-smp", "2"], 2),
        ("qemu-system-ppc64", "pseries-10.0", &["-smp", "2"], 2),
    ] {
        let Some(qemu) = x86.emulator(program) else { return };
        let vm = qemu.vm().machine(machine).memory(256 << 20).args(options.iter().copied());
        like_qemus_dump(vm, false, processors).unwrap_or_else(|error| panic!("{machine}: {error:?}"));
    }
}

/// A memory device of its own name, and a hot-plugged one, which has no address in the file.
#[test]
fn memory_with_a_name_of_the_user_is_found_and_what_has_no_address_can_be_placed() {
    fn shows(qemu: &Qemu) -> Result<(), Error> {
        let vm = qemu.vm().machine(&format!("{},memory-backend=mem", qemu.machine())).memory(64 << 20);
        let vm = vm.args(["-object", "memory-backend-ram,id=mem,size=64M"]);
        like_qemus_dump(vm, false, 0)?;

        let vm = qemu.vm().machine(&qemu.machine()).args(["-m", "64M,slots=2,maxmem=1G"]);
        let vm = vm.args([
            "-object",
            "memory-backend-ram,id=plugged,size=128M",
            "-device",
            "pc-dimm,memdev=plugged",
        ]);
        let Dumped { vm: _vm, stream, dump, folder } = dumped(vm, false)?;
        let ours = path(&folder, "ours");
        let export = |words: &[&str]| {
            let mut command = crate::kit::multifd(["export", "--force", "--format", "elf"]);
            crate::kit::Program::start(command.args(words).arg(&stream).arg(&ours)).end()
        };
        let ended = export(&[]);
        assert!(ended.stderr.contains("block plugged is left out"), "{ended:?}");
        let ended = export(&["--place", "4G=plugged"]);
        assert!(ended.code == Some(0) && !ended.stderr.contains("left out"), "{ended:?}");
        let (ours, dump) = (Elf::open(&ours), Elf::open(&dump));
        assert_eq!(ours.first_difference(&dump), None);
        assert!(ours.loads.iter().any(|load| (load.0, load.2) == (1 << 32, 128 << 20)), "{:x?}", ours.loads);
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    shows(&qemu).unwrap();
}

/// `read`, `find` and the formats raw and LiME have the memory that QEMU shows.
fn memory_is_shown(qemu: &Qemu) -> Result<(), Error> {
    let Dumped { mut vm, stream, dump: _, folder } = dumped(machine(qemu, &qemu.machine()), true)?;
    let length = 40 << 20;
    let memory = vm.pmemsave(0, length)?;
    // Elsewhere a processor does not see RAM.
    let ram = [0..0xa_0000, 0x10_0000..memory.len()];
    for range in ram.clone() {
        let shown = read(&[], &stream, range.start as u64, range.len() as u64);
        assert!(shown == memory[range.clone()], "{range:x?}");
    }
    // Neither end is that of a page.
    assert_eq!(read(&[], &stream, 0x20_0123, 0x1f_ff77), &memory[0x20_0123..0x20_0123 + 0x1f_ff77]);
    let beyond = look("read", &["--gpa", "0x2800000", "--len", "1"], &stream);
    beyond.assert_failed(1, &["RAM is at 0x0 to 0x27fffff", "there is no RAM at 0x2800000"]);
    let table = look("read", &["--gpa", "0x200000", "--len", "32"], &stream);
    assert!(table.stdout.starts_with(&format!("0000000000200000  {:02x} ", memory[0x20_0000])), "{table:?}");

    // A pattern that crosses pages, at all its places.
    let at = 0x40_0ff0;
    let pattern = &memory[at..at + 32];
    let digits: String = pattern.iter().map(|byte| format!("{byte:02x}")).collect();
    let expected: Vec<usize> = ram
        .iter()
        .flat_map(|range| {
            let start = range.start;
            memory[range.clone()]
                .windows(32)
                .enumerate()
                .filter(|(_, found)| *found == pattern)
                .map(move |(at, _)| start + at)
        })
        .collect();
    let found = look("find", &["--json", "--hex", &digits], &stream);
    assert_eq!(found.code, Some(0), "{found:?}");
    let found: Vec<usize> = serde_json::from_value(found.json()["addresses"].clone()).expect("numbers");
    let found: Vec<usize> =
        found.into_iter().filter(|at| ram.iter().any(|range| range.contains(at))).collect();
    assert_eq!(found, expected);
    let none = look("find", &["--text", "this text is not in the memory of any guest"], &stream);
    assert_eq!((none.code, &*none.stdout), (Some(1), ""), "{none:?}");

    let raw = path(&folder, "raw");
    let ended = look("export", &["--quiet", "--format", "raw", stream.to_str().expect("text")], &raw);
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{ended:?}");
    let bytes = fs::read(&raw).expect("the file");
    assert_eq!(bytes.len(), memory.len());
    assert!(ram.iter().all(|range| bytes[range.clone()] == memory[range.clone()]));
    let found = fs::metadata(&raw).expect("the file");
    assert!(found.blocks() * 512 < length && found.mode() & 0o777 == 0o600, "holes, and private: {found:?}");
    for format in ["raw", "lime", "elf", "kdump"] {
        let (file, text) = (path(&folder, "out"), stream.to_str().expect("text"));
        let ended = look("export", &["--force", "--format", format, text], &file);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let mut command = crate::kit::multifd(["export", "--quiet", "--format", format, text, "-"]);
        let piped = command.output().expect("started").stdout;
        assert!(piped == fs::read(&file).expect("the file"), "{format}: a pipe gets the same bytes");
    }
    let lime = path(&folder, "out");
    look("export", &["--force", "--format", "lime", stream.to_str().expect("text")], &lime);
    let lime = fs::read(&lime).expect("the file");
    assert_eq!(&lime[..8], b"EMiL\x01\0\0\0");
    assert_eq!(&lime[8..32], [&[0; 8][..], &[0xff, 0xff, 0x7f, 2, 0, 0, 0, 0], &[0; 8]].concat());
    assert!(lime[32..] == bytes);
    Ok(())
}

#[test]
fn memory_is_shown_as_qemu_shows_it_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    memory_is_shown(&qemu).unwrap();
}

#[test]
fn memory_is_shown_as_qemu_shows_it_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    memory_is_shown(&qemu).unwrap();
}

/// The value of a field in `inspect --device --json`.
fn field<'a>(device: &'a Value, name: &str) -> &'a Value {
    let fields = device["fields"].as_array().expect("fields");
    &fields.iter().find(|field| field["name"] == name).expect(name)["value"]
}

fn devices_are_shown(qemu: &Qemu) -> Result<(), Error> {
    let Dumped { mut vm, stream, dump: _, folder: _folder } =
        dumped(machine(qemu, &qemu.machine()).args(["-smp", "2"]), true)?;
    let registers =
        vm.execute("human-monitor-command", json!({ "command-line": "info registers", "cpu-index": 0 }))?;
    let registers = registers.as_str().expect("text");
    let shown = look("inspect", &["--json", "--device", "cpu:0"], &stream);
    let shown = shown.json();
    assert_eq!((&shown[0]["name"], &shown[0]["instance-id"]), (&json!("cpu"), &json!(0)));
    let word = |name: &str| {
        let (_, rest) = registers.split_once(name).expect(name);
        u64::from_str_radix(rest.split_whitespace().next().expect("a number"), 16).expect("a number")
    };
    let (instruction, stack, control) = match registers.contains("RIP=") {
        true => (word("RIP="), word("RSP="), word("CR3=")),
        false => (word("EIP="), word("ESP="), word("CR3=")),
    };
    assert_eq!(field(&shown[0], "env.eip"), &json!(instruction), "{registers}");
    assert_eq!(field(&shown[0], "env.regs")[4], json!(stack), "{registers}");
    assert_eq!(field(&shown[0], "env.cr[3]"), &json!(control), "{registers}");
    let segments = field(&shown[0], "env.segs").as_array().expect("an array");
    assert_eq!((segments.len(), &segments[1][0]["name"]), (6, &json!("selector")));

    let both = look("inspect", &["--device", "cpu"], &stream);
    assert!(
        both.stdout.contains("cpu:0  version 12") && both.stdout.contains("cpu:1  version 12"),
        "{both:?}"
    );
    let all = look("inspect", &["--devices", "--json"], &stream).json();
    let listed = look("inspect", &["--json"], &stream).json();
    assert_eq!(all.as_array().map(Vec::len), listed["devices"].as_array().map(Vec::len));
    look("inspect", &["--device", "cpu:7"], &stream).assert_failed(1, &["no such device", "cpu:1"]);
    Ok(())
}

#[test]
fn state_of_devices_is_shown_by_names_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    devices_are_shown(&qemu).unwrap();
}

#[test]
fn state_of_devices_is_shown_by_names_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    devices_are_shown(&qemu).unwrap();
}

/// Two moments of one guest: its memory differs where it has written, and its clock is another one.
#[test]
fn differences_between_two_moments_are_shown_and_equal_machines_are_equal() {
    fn differs(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let mut vm = source(machine(qemu, &qemu.machine()))?;
        let (one, two) = (path(&folder, "one"), path(&folder, "two"));
        let mut before = Vec::new();
        for (file, memory) in [(&one, Some(&mut before)), (&two, None)] {
            vm.stop()?;
            if let Some(memory) = memory {
                *memory = vm.pmemsave(0x10_0000, 39 << 20)?;
            }
            migrate(&mut vm, &format!("exec:cat > {}", file.display()))?;
            if file == &one {
                let at = vm.round()?.unwrap_or_default();
                vm.cont()?;
                vm.wait_round(at + 1, multifd_testkit::qemu::PATIENCE)?;
            }
        }
        let after = vm.pmemsave(0x10_0000, 39 << 20)?;
        let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
        let expected: Vec<u64> =
            pages.filter(|(_, (a, b))| a != b).map(|(page, _)| (0x10_0000 + page * PAGE) as u64).collect();
        assert!(!expected.is_empty(), "the guest has written");

        let diff =
            |a: &Path, b: &Path| run([Path::new("diff"), Path::new("--json"), Path::new("--runs=0"), a, b]);
        let found = diff(&one, &two);
        assert_eq!(found.code, Some(1), "{found:?}");
        let found = found.json();
        assert_eq!((&found["equal"], &found["blocks"][0]["name"]), (&json!(false), &json!("pc.ram")));
        let runs = found["blocks"][0]["runs"].as_array().expect("runs").iter();
        let runs =
            runs.map(|run| (run["offset"].as_u64().expect("u64"), run["length"].as_u64().expect("u64")));
        let pages: Vec<u64> =
            runs.flat_map(|(offset, length)| (offset..offset + length).step_by(PAGE)).collect();
        let high: Vec<u64> = pages.iter().copied().filter(|page| *page >= 0x10_0000).collect();
        assert_eq!(high, expected);
        assert_eq!(found["blocks"][0]["pages"], json!(pages.len()));
        let devices = found["devices"].as_array().expect("devices");
        assert!(
            devices.iter().any(|device| device["name"] == "timer" && !device["fields"].is_null()),
            "{found}"
        );

        let equal = diff(&one, &one);
        assert_eq!((equal.code, &equal.json()), (Some(0), &json!({ "equal": true })));
        let lines = run([Path::new("diff"), &one, &two]);
        assert!(
            lines.stdout.contains("pages differ") && lines.stdout.contains("device timer:0"),
            "{lines:?}"
        );
        run([Path::new("diff"), &one, &path(&folder, "none")]).assert_failed(2, &["cannot read"]);
        Ok(())
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    differs(&qemu).unwrap();
}
