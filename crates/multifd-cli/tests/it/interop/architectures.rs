//! Guests of other architectures: machines that have never run, with RAM filled with a pattern.
//!
//! The destination is started without the pattern. Everything it has then came through the file.

use std::{
    fs,
    time::{Duration, Instant},
};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder};
use serde_json::json;

use crate::kit::{PAGE, Program, file_uri, folder, migrate, path, run, send, stored_block};

/// A machine of another architecture.
#[derive(Clone, Copy)]
struct Board {
    program: &'static str,
    machine: &'static str,
    options: &'static [&'static str],
    /// RAM's block, its guest-physical address, its length.
    block: &'static str,
    base: u64,
    memory: u64,
}

const AARCH64: Board = Board {
    program: "qemu-system-aarch64",
    machine: "virt-10.0",
    options: &["-cpu", "max"],
    block: "mach-virt.ram",
    base: 0x4000_0000,
    memory: 64 << 20,
};
const AARCH64_7_2: Board = Board { machine: "virt-7.2", ..AARCH64 };
/// Its machine type has no version in its name.
const RISCV64: Board = Board {
    program: "qemu-system-riscv64",
    machine: "virt",
    options: &["-bios", "none"],
    block: "riscv_virt_board.ram",
    base: 0x8000_0000,
    memory: 64 << 20,
};
const S390X: Board = Board {
    program: "qemu-system-s390x",
    machine: "s390-ccw-virtio-10.0",
    options: &[],
    block: "s390.ram",
    base: 0,
    memory: 64 << 20,
};
/// The last machine type whose storage attributes are not sent.
const S390X_2_9: Board =
    Board { machine: "s390-ccw-virtio-2.9", options: &["-action", "panic=pause"], ..S390X };
/// A big-endian guest of 32 bits, with a firmware that never ends.
const POWER_MAC: Board = Board {
    program: "qemu-system-ppc64",
    machine: "g3beige",
    options: &[],
    block: "ppc_heathrow.ram",
    base: 0,
    memory: 64 << 20,
};
const PPC64: Board = Board {
    program: "qemu-system-ppc64",
    machine: "pseries-10.0",
    options: &[],
    block: "ppc_spapr.ram",
    base: 0,
    memory: 256 << 20,
};

impl Board {
    fn machine(&self, qemu: &Qemu) -> VmBuilder {
        qemu.vm().machine(self.machine).memory(self.memory).args(self.options.iter().copied()).paused()
    }

    /// A machine that has never run and whose RAM contains the pattern.
    fn filled(&self, qemu: &Qemu) -> Result<Vm, Error> {
        let folder = folder();
        let file = path(&folder, "pattern");
        fs::write(&file, pattern()).expect("the pattern");
        let loader =
            format!("loader,file={},addr={:#x},force-raw=on", file.display(), self.base + PATTERN_AT);
        let mut vm = self.machine(qemu).arg("-device").arg(loader).start()?;
        let memory = vm.pmemsave(self.base + PATTERN_AT, PATTERN_LENGTH)?;
        assert_eq!(first_difference(&memory, &pattern()), None, "the pattern is in place");
        Ok(vm)
    }

    fn ram(&self, vm: &mut Vm) -> Result<Vec<u8>, Error> {
        vm.pmemsave(self.base, self.memory)
    }
}

/// Pages that differ, one in four of them zero.
fn pattern() -> Vec<u8> {
    (0..PATTERN_LENGTH / PAGE as u64)
        .flat_map(|page| {
            let seed = if page % 4 == 0 { 0 } else { page.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
            (0..PAGE as u64 / 8).flat_map(move |word| (seed.wrapping_mul(word + 1)).to_be_bytes())
        })
        .collect()
}

const PATTERN_AT: u64 = 16 << 20;
const PATTERN_LENGTH: u64 = 8 << 20;

fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    assert_eq!(one.len(), other.len());
    one.chunks(PAGE).zip(other.chunks(PAGE)).position(|(a, b)| a != b)
}

/// Asserts that the machine in the destination has all of it, and starts.
fn is_there_and_starts(board: &Board, to: &mut Vm, before: &[u8]) -> Result<(), Error> {
    assert_eq!(first_difference(before, &board.ram(to)?), None, "page, source and destination");
    to.cont()?;
    // A firmware that finds nothing to boot may end at once.
    to.wait_event("RESUME", PATIENCE).map(drop)
}

/// source → `receive` → file → `send` → destination.
fn there_and_back(qemu: Option<Qemu>, board: &Board, channels: u8) -> Result<(), Error> {
    let Some(qemu) = qemu.and_then(|qemu| qemu.emulator(board.program)) else { return Ok(()) };
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = board.filled(&qemu)?;
    let before = board.ram(&mut from)?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(channels)?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    migrate(&mut from, &address)?;
    receive.done();
    assert_eq!(first_difference(&before, &stored_block(&file, board.block)), None, "page, source and file");
    let inspected = run(["inspect".as_ref(), "--json".as_ref(), file.as_os_str()]).json();
    assert_eq!(inspected["machine"], json!(board.machine));
    assert_eq!(inspected["page-size"], json!(PAGE));

    let mut to = board.machine(&qemu).incoming().start()?;
    to.set_multifd_channels(channels)?;
    send(&["--multifd-channels", &channels.to_string()], &file, &mut to, "tcp:127.0.0.1:0")?;
    is_there_and_starts(board, &mut to, &before)
}

#[test]
fn aarch64_machine_moves_over_channels_10_0() {
    there_and_back(Qemu::v10_0(), &AARCH64, 2).unwrap();
}

#[test]
fn aarch64_machine_moves_over_channels_7_2() {
    there_and_back(Qemu::v7_2(), &AARCH64_7_2, 2).unwrap();
}

#[test]
#[ignore = "slow: another machine of x86 shows the same"]
fn aarch64_machine_moves_with_multifd_off_10_0() {
    there_and_back(Qemu::v10_0(), &AARCH64, 0).unwrap();
}

#[test]
#[ignore = "slow: another machine of x86 shows the same"]
fn aarch64_machine_moves_with_multifd_off_7_2() {
    there_and_back(Qemu::v7_2(), &AARCH64_7_2, 0).unwrap();
}

#[test]
fn riscv64_machine_without_a_version_moves_over_channels_10_0() {
    there_and_back(Qemu::v10_0(), &RISCV64, 2).unwrap();
}

#[test]
#[ignore = "slow: another machine of x86 shows the same"]
fn riscv64_machine_moves_with_multifd_off_10_0() {
    there_and_back(Qemu::v10_0(), &RISCV64, 0).unwrap();
}

#[test]
fn big_endian_power_mac_moves_over_channels_10_0() {
    there_and_back(Qemu::v10_0(), &POWER_MAC, 2).unwrap();
}

#[test]
fn big_endian_s390x_machine_of_2_9_moves_over_channels_10_0() {
    there_and_back(Qemu::v10_0(), &S390X_2_9, 2).unwrap();
}

/// We write, QEMU loads the file itself.
fn ours_is_loaded(qemu: Option<Qemu>, board: &Board) -> Result<(), Error> {
    let Some(qemu) = qemu.and_then(|qemu| qemu.emulator(board.program)) else { return Ok(()) };
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = board.filled(&qemu)?;
    let before = board.ram(&mut from)?;
    from.set_multifd_channels(2)?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    migrate(&mut from, &address)?;
    receive.done();
    let mut to = board.machine(&qemu).incoming().start()?;
    to.set_capabilities(&[("mapped-ram", true)])?;
    to.migrate_incoming(&file_uri(&file))?;
    to.wait_migration("completed", PATIENCE)?;
    is_there_and_starts(board, &mut to, &before)
}

#[test]
#[ignore = "slow: files.rs shows it with x86"]
fn our_file_of_an_aarch64_machine_is_loaded_by_10_0() {
    ours_is_loaded(Qemu::v10_0(), &AARCH64).unwrap();
}

#[test]
#[ignore = "slow: files.rs shows it with x86"]
fn our_file_of_a_riscv64_machine_is_loaded_by_10_0() {
    ours_is_loaded(Qemu::v10_0(), &RISCV64).unwrap();
}

/// QEMU writes, we send.
fn theirs_is_sent(qemu: Option<Qemu>, board: &Board) -> Result<(), Error> {
    let Some(qemu) = qemu.and_then(|qemu| qemu.emulator(board.program)) else { return Ok(()) };
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = board.filled(&qemu)?;
    let before = board.ram(&mut from)?;
    from.set_capabilities(&[("mapped-ram", true)])?;
    migrate(&mut from, &file_uri(&file))?;
    assert_eq!(first_difference(&before, &stored_block(&file, board.block)), None, "page, source and file");
    let mut to = board.machine(&qemu).incoming().start()?;
    to.set_multifd_channels(2)?;
    send(&["--multifd-channels", "2"], &file, &mut to, "tcp:127.0.0.1:0")?;
    is_there_and_starts(board, &mut to, &before)
}

#[test]
#[ignore = "slow: files.rs shows it with x86"]
fn file_of_an_aarch64_machine_of_10_0_is_sent() {
    theirs_is_sent(Qemu::v10_0(), &AARCH64).unwrap();
}

#[test]
#[ignore = "slow: files.rs shows it with x86"]
fn file_of_a_riscv64_machine_of_10_0_is_sent() {
    theirs_is_sent(Qemu::v10_0(), &RISCV64).unwrap();
}

/// Its storage attributes are sent in pieces, in a section other than RAM.
#[test]
fn big_endian_s390x_machine_moves_over_channels_10_0() {
    there_and_back(Qemu::v10_0(), &S390X, 2).unwrap();
}

/// Its hash table does.
#[test]
fn big_endian_ppc64_machine_moves_over_channels_10_0() {
    there_and_back(Qemu::v10_0(), &PPC64, 2).unwrap();
}

#[test]
#[ignore = "slow: another machine of x86 shows the same"]
fn big_endian_ppc64_machine_moves_with_multifd_off_10_0() {
    there_and_back(Qemu::v10_0(), &PPC64, 0).unwrap();
}

/// The file has the pieces where QEMU's own would have them.
#[test]
fn our_files_of_machines_with_pieces_beside_ram_are_loaded_by_10_0() {
    for board in [&S390X, &PPC64] {
        ours_is_loaded(Qemu::v10_0(), board).unwrap();
    }
}

#[test]
fn files_of_machines_with_pieces_beside_ram_of_10_0_are_sent() {
    for board in [&S390X, &PPC64] {
        theirs_is_sent(Qemu::v10_0(), board).unwrap();
    }
}

/// A firmware that asks the hypervisor for two entries of the hash table, near its beginning and further on, and then
/// stops: `li r3, H_ENTER; li r4, 0; li r5, index; li r6, valid; li r7, memory's attributes; sc 1`.
fn firmware() -> Vec<u8> {
    const CODE: [u32; 10] = [
        0x3860_0008,
        0x3880_0000,
        0x38a0_0018,
        0x38c0_0001,
        0x38e0_0010,
        0x4400_0022,
        0x3860_0008,
        0x38a0_0800,
        0x4400_0022,
        0x4800_0000,
    ];
    let code = CODE.iter().flat_map(|word| word.to_be_bytes());
    std::iter::repeat_n(0, 0x100).chain(code).collect()
}

/// Index, one valid entry, no invalid one, the entry: as in a piece of the table.
fn entry(index: u32) -> Vec<u8> {
    let words = [0_u32, 1, 0, 0x10];
    let head = index.to_be_bytes().into_iter().chain([0, 1, 0, 0]);
    head.chain(words.iter().flat_map(|word| word.to_be_bytes())).collect()
}

fn has_entries(file: &std::path::Path) -> bool {
    let bytes = fs::read(file).expect("read");
    [entry(0x18), entry(0x800)].iter().all(|entry| bytes.windows(entry.len()).any(|found| found == entry))
}

/// There, back, and there again: the destination has the entries that the source's guest has made.
fn hash_table_travels(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let [firmware_file, first, second] = ["firmware", "first", "second"].map(|name| path(&folder, name));
    fs::write(&firmware_file, firmware()).expect("the firmware");
    let builder =
        || qemu.vm().machine(PPC64.machine).memory(PPC64.memory).arg("-bios").arg(firmware_file.clone());
    let capture = |vm: &mut Vm, file: &std::path::Path| -> Result<(), Error> {
        vm.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", file);
        migrate(vm, &address)?;
        receive.done();
        Ok(())
    };
    let mut from = builder().start()?;
    let end = Instant::now() + PATIENCE;
    loop {
        let registers = from.execute("human-monitor-command", json!({ "command-line": "info registers" }))?;
        if registers.as_str().expect("text").contains("NIP 0000000000000124") {
            break;
        }
        assert!(Instant::now() < end, "the firmware does not come to its end: {registers}");
        std::thread::sleep(Duration::from_millis(20));
    }
    from.stop()?;
    capture(&mut from, &first)?;
    assert!(has_entries(&first), "source and file");
    let mut to = builder().paused().incoming().start()?;
    to.set_multifd_channels(2)?;
    send(&[], &first, &mut to, "tcp:127.0.0.1:0")?;
    capture(&mut to, &second)?;
    assert!(has_entries(&second), "source and destination");
    Ok(())
}

#[test]
fn hash_table_of_a_ppc64_guest_travels_10_0() {
    let Some(qemu) = Qemu::v10_0().and_then(|qemu| qemu.emulator(PPC64.program)) else { return };
    hash_table_travels(&qemu).unwrap();
}
