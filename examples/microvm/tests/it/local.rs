//! A machine is handed over to other processes of this host, in all that it goes through.

use tempfile::TempDir;

use crate::kit::{Machine, folder, number};

/// Hands a machine over to a new process.
fn hop(source: Machine, folder: &TempDir, name: &str) -> Machine {
    let (destination, address) = Machine::incoming_local(folder, name);
    let report = source.migrate_with(&address, &["--local"]).wait_with_output().expect("waited for");
    assert!(report.status.success(), "{report:?}");
    assert!(number(&report, "transferred") < 100_000, "memory was copied: {report:?}");
    let left_at = number(&report, "batches");
    assert!(source.wait(), "the source's process ends in order when its machine has gone");
    assert!(destination.batches() >= left_at, "the counter continues");
    destination.assert_well();
    destination
}

fn assert_refused(source: &Machine, address: &str, flags: &[&str], expected: &str) {
    let output = source.migrate_with(address, flags).wait_with_output().expect("waited for");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains(expected), "{expected}: {text}");
    source.assert_well();
}

#[test]
fn machine_is_handed_over_twice_and_then_migrates_to_other_memory() {
    let Some(folder) = folder() else { return };
    let machine = hop(Machine::run_shared(&folder, "first"), &folder, "second");
    let machine = hop(machine, &folder, "third");
    let (last, address) = Machine::incoming(&folder, "fourth");
    let report = machine.migrate(&address, "0").wait_with_output().expect("waited for");
    assert!(report.status.success() && number(&report, "transferred") > 60 << 20, "{report:?}");
    assert!(machine.wait());
    last.assert_well();
}

#[test]
fn guest_continues_when_it_cannot_be_handed_over() {
    let Some(folder) = folder() else { return };
    let private = Machine::run(&folder, "private");
    let (destination, address) = Machine::incoming_local(&folder, "destination");
    assert_refused(&private, &address, &["--local"], "start the machine with --shared");
    // It can still migrate there, but the destination expects memory.
    assert_refused(&private, &address, &["--channels", "0"], "it has handed over no memory");
    assert!(!destination.wait());

    let shared = Machine::run_shared(&folder, "shared");
    assert_refused(&shared, &address, &["--local"], "connect to unix:");
    let (other, tcp) = Machine::incoming(&folder, "other");
    assert_refused(&shared, &tcp, &["--local"], "is not a unix socket");
    drop(other);
    hop(shared, &folder, "last");
}

/// The process that takes it over is killed at any moment before it has the guest.
#[test]
fn machine_survives_the_end_of_the_process_that_takes_it_over() {
    let Some(folder) = folder() else { return };
    let mut machine = Machine::run_shared(&folder, "machine");
    let (mut stayed, mut left, mut unknown) = (0, 0, 0);
    for round in 0..12_u64 {
        let (destination, address) = Machine::incoming_local(&folder, &format!("killed{round}"));
        let client = machine.migrate_with(&address, &["--local"]);
        std::thread::sleep(std::time::Duration::from_micros(round * 400));
        destination.kill();
        let output = client.wait_with_output().expect("waited for");
        if output.status.success() {
            // It was the owner when it was killed.
            left += 1;
            machine = Machine::run_shared(&folder, &format!("machine{round}"));
        } else if String::from_utf8_lossy(&output.stderr).contains("check whether the guest runs") {
            // Killed between its confirmation and its arrival: the guest may have run there, so it must not run here.
            unknown += 1;
            machine = Machine::run_shared(&folder, &format!("machine{round}"));
        } else {
            stayed += 1;
            machine.assert_well();
        }
    }
    println!("{stayed} stayed, {left} left, {unknown} unknown");
    assert!(stayed > 0);
    hop(machine, &folder, "last");
}
