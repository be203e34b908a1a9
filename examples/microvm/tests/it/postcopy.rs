//! Guests that move before their memory.

use tempfile::TempDir;

use crate::kit::{Machine, folder, number};

/// Less than the guest writes.
const LINE: &str = "20MB";

/// Moves a machine to a new process.
fn hop(source: Machine, folder: &TempDir, name: &str, when: &str) -> Machine {
    let (mut destination, address) = Machine::incoming_early(folder, name);
    let when = format!("--postcopy={when}");
    let flags = ["--max-bandwidth", LINE, "--downtime-limit", "50", &when];
    let report = source.migrate_with(&address, &flags).wait_with_output().expect("waited for");
    assert!(report.status.success(), "{name}, {when}: {report:?}");
    assert_eq!(number(&report, "switched"), 1, "{name}: {report:?}");
    assert_eq!(number(&report, "over_channels"), 1, "{name}: {report:?}");
    assert!(number(&report, "later_pages") > 0, "{name}: {report:?}");
    let left_at = number(&report, "batches");
    assert!(source.wait(), "the source's process ends in order when its machine has gone");
    assert!(destination.line().starts_with("running"));
    let complete = destination.line();
    assert!(complete.starts_with("all memory is there"), "{name}: {complete}");
    assert!(destination.batches() >= left_at, "the counter continues");
    destination.assert_well();
    destination
}

#[test]
fn a_guest_that_outwrites_the_line_hops_ten_times() {
    let Some(folder) = folder() else { return };
    let mut machine = Machine::run_at(&folder, "0", "1GB");
    for (number, when) in (1..=10).zip(["start", "after:0.3", "after:0.01"].iter().cycle()) {
        machine = hop(machine, &folder, &number.to_string(), when);
    }
}

#[test]
fn a_destination_that_runs_no_guest_early_refuses_and_the_guest_continues() {
    let Some(folder) = folder() else { return };
    let machine = Machine::run(&folder, "source");
    let (destination, address) = Machine::incoming(&folder, "destination");
    let report =
        machine.migrate_with(&address, &["--postcopy=start"]).wait_with_output().expect("waited for");
    let text = String::from_utf8_lossy(&report.stderr);
    assert!(!report.status.success() && text.contains("postcopy-ram"), "{text}");
    assert!(!destination.wait());
    machine.assert_well();
    // It does not have to switch.
    let (destination, address) = Machine::incoming_early(&folder, "again");
    let report = machine.migrate_with(&address, &["--postcopy"]).wait_with_output().expect("waited for");
    assert!(report.status.success(), "{report:?}");
    assert!(machine.wait());
    destination.assert_well();
}
