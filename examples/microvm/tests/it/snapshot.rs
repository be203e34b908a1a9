//! A guest that checks itself is captured and restored while it runs.

use std::os::unix::fs::FileExt;

use crate::kit::{Machine, folder, number, program};

#[test]
fn a_captured_guest_runs_on_here_and_out_of_the_file_before_its_memory_is_there() {
    let Some(folder) = folder() else { return };
    let file = folder.path().join("a machine.ram");
    let machine = Machine::run(&folder, "captured");
    let captured = machine.snapshot(&file);
    assert!(captured.status.success(), "{captured:?}");
    assert!(number(&captured, "pages") > 15_000, "{captured:?}");
    let counted = number(&captured, "batches");
    machine.assert_well();
    machine.kill();
    // Two machines from one file, at once, and one that is restored before it runs.
    let mut lazy = ["one", "other"].map(|name| Machine::restored(&folder, name, &file, &["--lazy"]));
    let plain = Machine::restored(&folder, "plain", &file, &[]);
    for machine in lazy.iter().chain([&plain]) {
        assert!(machine.batches() >= counted);
        machine.assert_well();
    }
    for machine in &mut lazy {
        let line = machine.line();
        assert!(line.starts_with("all memory is there: faults="), "{line}");
        machine.assert_well();
    }
}

#[test]
fn a_guest_runs_out_of_a_chain_of_captures_and_not_without_one_of_its_files() {
    let Some(folder) = folder() else { return };
    let files = ["a base.ram", "a delta.ram", "second.ram"].map(|name| folder.path().join(name));
    let machine = Machine::run_at(&folder, "captured", "1MB");
    // What is captured at one moment is a base as well.
    let captured = machine.snapshot_moment(&files[0]);
    let said = String::from_utf8_lossy(&captured.stderr);
    if said.contains("may not handle page faults") || said.contains("lacks the userfaultfd features") {
        return multifd_testkit::lacks(&said);
    }
    assert!(captured.status.success(), "{captured:?}");
    for (base, delta) in [(0, 1), (1, 2)] {
        let captured = machine.snapshot_since(&files[base], &files[delta]);
        assert!(captured.status.success(), "{captured:?}");
        use std::os::unix::fs::MetadataExt;
        let size = |file: &std::path::Path| std::fs::metadata(file).expect("there").blocks();
        assert!(size(&files[delta]) < size(&files[0]) / 2, "the delta has pages that did not change");
    }
    // A delta on itself would destroy its base.
    assert!(!machine.snapshot_since(&files[2], &files[2]).status.success());
    machine.assert_well();
    machine.kill();
    for flags in [&[][..], &["--lazy"]] {
        let restored = Machine::restored(&folder, &format!("restored {flags:?}"), &files[2], flags);
        restored.assert_well();
        restored.kill();
    }
    std::fs::rename(&files[0], folder.path().join("elsewhere")).expect("renamed");
    let refused =
        program().arg("restore").arg(&files[2]).arg("--control").arg(folder.path().join("x")).output();
    let refused = refused.expect("run");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("a base.ram"), "{said}");
}

#[test]
fn a_guest_that_is_restored_lazily_may_move_before_its_memory_is_there() {
    let Some(folder) = folder() else { return };
    let file = folder.path().join("machine.ram");
    let machine = Machine::run(&folder, "captured");
    assert!(machine.snapshot(&file).status.success());
    machine.kill();
    let lazy = Machine::restored(&folder, "lazy", &file, &["--lazy"]);
    let (destination, address) = Machine::incoming(&folder, "destination");
    let report = lazy.migrate(&address, "0").wait_with_output().expect("waited for");
    assert!(report.status.success(), "{report:?}");
    assert!(lazy.wait());
    destination.assert_well();
}

/// The guest stops with an error at the damaged page, and never reads other bytes: in this process, or by a signal of the kernel.
#[test]
fn a_guest_does_not_run_on_with_a_damaged_page() {
    let Some(folder) = folder() else { return };
    let file = folder.path().join("machine.ram");
    let machine = Machine::run(&folder, "captured");
    assert!(machine.snapshot(&file).status.success());
    machine.kill();
    // A page in the middle of its memory, which begins at 1 MiB in the file.
    let damaged = std::fs::OpenOptions::new().write(true).open(&file).expect("opened");
    damaged.write_all_at(b"rot", (32 << 20) + 100).expect("damaged");
    let mut lazy = Machine::restored(&folder, "lazy", &file, &["--lazy"]);
    let line = lazy.line();
    assert!(
        line.starts_with("memory is missing: 1 pages could not be had and are poisoned") || line.is_empty(),
        "{line}"
    );
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let status = lazy.ask("status");
        if !status.status.success() {
            break;
        }
        assert!(std::time::Instant::now() < until, "the guest runs on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_busy_guest_is_captured_at_one_moment_and_both_run_on_without_a_wrong_byte() {
    let Some(folder) = folder() else { return };
    let machine = Machine::run_at(&folder, "captured", "400MB");
    for round in 0..3 {
        let file = folder.path().join(format!("{round}.ram"));
        let captured = machine.snapshot_moment(&file);
        let said = String::from_utf8_lossy(&captured.stderr);
        if said.contains("may not handle page faults") || said.contains("lacks the userfaultfd features") {
            return multifd_testkit::lacks(&said);
        }
        assert!(captured.status.success(), "{captured:?}");
        assert!(number(&captured, "pages") > 15_000, "{captured:?}");
        let lazy = Machine::restored(&folder, &format!("lazy {round}"), &file, &["--lazy"]);
        let plain = Machine::restored(&folder, &format!("plain {round}"), &file, &[]);
        for machine in [&machine, &lazy, &plain] {
            machine.assert_well();
        }
        lazy.kill();
        plain.kill();
    }
    machine.kill();
}

#[test]
fn the_demo_of_captures_finds_no_wrong_byte() {
    let Some(_) = folder() else { return };
    let demo = program().args(["demo", "--snapshot", "--size", "64MiB", "--rate", "100MB"]).output();
    let demo = demo.expect("run");
    let (said, failed) = (String::from_utf8_lossy(&demo.stdout), String::from_utf8_lossy(&demo.stderr));
    if failed.contains("may not handle page faults") || failed.contains("lacks the userfaultfd features") {
        return multifd_testkit::lacks(&failed);
    }
    assert!(demo.status.success(), "{demo:?}");
    assert_eq!(said.matches("; 0 wrong bytes of 66060288\n").count(), 2, "{demo:?}");
}
