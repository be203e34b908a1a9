//! The guest boots, counts, and can fail.

use std::fs;

use multifd_testkit::guest::{Guest, Report};
use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};

fn counts_rounds(qemu: &Qemu) -> Result<(), Error> {
    let mut vm = qemu.vm().guest(&Guest::new()).start()?;
    let first = vm.wait_round(2, PATIENCE)?;
    vm.wait_round(first + 3, PATIENCE)?;
    vm.quit().map(drop)
}

#[test]
fn guest_boots_and_counts_rounds_on_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    counts_rounds(&qemu).unwrap();
}

#[test]
fn guest_boots_and_counts_rounds_on_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    counts_rounds(&qemu).unwrap();
}

#[test]
fn stopped_guest_holds_what_it_was_told_to_write() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let guest = Guest::new().working_set(64).filled(64).zero_every(4);
    let mut vm = qemu.vm().guest(&guest).start().unwrap();
    vm.wait_round(1, PATIENCE).unwrap();
    vm.stop().unwrap();
    let range = guest.filled_range();

    let filled = vm.pmemsave(range.start, range.end - range.start).unwrap();

    for (index, page) in filled.chunks(4096).enumerate() {
        let is_zero = page.iter().all(|byte| *byte == 0);
        assert_eq!(is_zero, index % 4 == 3, "page {index}");
    }
    let untouched = vm.pmemsave(range.end, 4096).unwrap();
    assert!(untouched.iter().all(|byte| *byte == 0));
}

/// Saves a stopped guest to a file, changes one byte of it there, and resumes it from the file.
fn run_on_with_a_changed_byte(guest: &Guest, address: u64) -> Vm {
    let qemu = Qemu::v10_0().unwrap();
    let mut source = qemu.vm().guest(guest).start().unwrap();
    source.wait_round(1, PATIENCE).unwrap();
    source.stop().unwrap();
    source.set_capabilities(&[("mapped-ram", true)]).unwrap();
    let path = source.path("saved");
    source.migrate(&format!("file:{}", path.display())).unwrap();
    source.wait_migration("completed", PATIENCE).unwrap();

    let mut bytes = fs::read(&path).unwrap();
    // The block's entry: name and used length; the position of its pages is 20 bytes into its header.
    let name = b"\x06pc.ram";
    let entry = bytes.windows(name.len()).position(|window| window == name).unwrap();
    let field = &bytes[entry + name.len() + 8 + 20..][..8];
    let pages = field.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    bytes[usize::try_from(pages + address).unwrap()] ^= 0x40;
    fs::write(&path, bytes).unwrap();

    let mut destination = qemu.vm().guest(guest).incoming().start().unwrap();
    destination.set_capabilities(&[("mapped-ram", true)]).unwrap();
    destination.migrate_incoming(&format!("file:{}", path.display())).unwrap();
    destination.wait_migration("completed", PATIENCE).unwrap();
    destination.cont().unwrap();
    destination
}

fn found(vm: &mut Vm) -> String {
    let error = vm.wait_round(u32::MAX, PATIENCE).unwrap_err();
    let bad = vm.serial().unwrap().into_iter().find_map(|report| match report {
        Report::Bad(line) => Some(line),
        _ => None,
    });
    bad.unwrap_or_else(|| panic!("expected the guest to meet the changed byte: {error}"))
}

#[test]
fn changed_byte_in_the_working_set_is_met_by_the_guest() {
    let Some(_) = Qemu::v10_0() else { return };
    let guest = Guest::new().working_set(256);
    let address = guest.working_set_range().end - 0x2ff8;
    let mut vm = run_on_with_a_changed_byte(&guest, address);
    let line = found(&mut vm);
    assert!(line.starts_with(&format!("BAD addr={address:08x} want=")), "{line}");
}

#[test]
fn changed_byte_in_a_page_filled_once_is_met_by_the_guest() {
    let Some(_) = Qemu::v10_0() else { return };
    let guest = Guest::new().working_set(256);
    let address = guest.filled_range().start + 0x5004;
    let line = found(&mut run_on_with_a_changed_byte(&guest, address));
    assert!(line.starts_with(&format!("BAD addr={address:08x} want=")), "{line}");
}
