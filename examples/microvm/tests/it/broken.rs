//! A connection of a migration breaks, by a proxy between the processes.

use std::process::Output;

use multifd_testkit::proxy::Proxy;

use crate::kit::{Machine, folder, number};

pub(crate) const FLAG: &str = "--channels-may-break";

/// Moves `source` over a main connection and three channels, one of which breaks.
fn broken(source: &Machine, address: &str, flags: &[&str], breaks: usize) -> Output {
    let target = address.trim_start_matches("tcp:").parse().expect("an address");
    // After the set-up, and in the first pages of a channel.
    let proxy = Proxy::breaking(target, breaks, if breaks == 0 { 250 } else { 300_000 }).expect("a proxy");
    // At least three seconds for the amount it must send.
    let flags = [&["--max-bandwidth=20MB", "--channels=3"], flags].concat();
    let client = source.migrate_with(&format!("tcp:{}", proxy.address()), &flags);
    let report = client.wait_with_output().expect("waited for");
    assert!(proxy.has_broken(), "connection {breaks} has not broken: {report:?}");
    report
}

fn lost(report: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&report.stdout);
    let lost = text.split_whitespace().find_map(|word| word.strip_prefix("lost_channels="));
    lost.map(|lost| lost.split(',').map(ToOwned::to_owned).collect()).unwrap_or_default()
}

#[test]
fn a_guest_moves_although_a_connection_breaks_and_the_report_names_the_channel() {
    let Some(folder) = folder() else { return };
    // Without post-copy, and before a switch to it.
    for (name, there, here) in [
        ("plain", &[FLAG][..], &[FLAG][..]),
        ("switches", &[FLAG, "--postcopy"], &[FLAG, "--postcopy=after:2"]),
    ] {
        let source = Machine::run_at(&folder, &format!("{name} source"), "10MB");
        let (destination, address) = Machine::incoming_with(&folder, name, there);
        let report = broken(&source, &address, here, 2);
        assert!(report.status.success(), "{name}: {report:?}");
        let lost = lost(&report);
        assert!(lost.len() == 1 && ["0", "1", "2"].contains(&&*lost[0]), "{name}: {report:?}");
        if name == "switches" {
            assert_eq!(number(&report, "switched"), 1, "{report:?}");
        }
        let left_at = number(&report, "batches");
        assert!(source.wait(), "the source's process ends in order when its machine has gone");
        assert!(destination.batches() >= left_at, "the counter continues");
        destination.assert_well();
    }
}

#[test]
fn a_connection_that_breaks_ends_the_migration_unless_both_sides_agree_and_the_guest_runs_on() {
    let Some(folder) = folder() else { return };
    let source = Machine::run_at(&folder, "source", "10MB");
    for (name, there, here, breaks) in [
        ("neither", &[][..], &[][..], 2),
        ("destination only", &[FLAG], &[], 2),
        ("source only", &[], &[FLAG], 2),
        ("main", &[FLAG], &[FLAG], 0),
    ] {
        let (destination, address) = Machine::incoming_with(&folder, name, there);
        let report = broken(&source, &address, here, breaks);
        assert!(!report.status.success(), "{name}: {report:?}");
        assert!(!destination.wait(), "{name}: a destination without a machine fails");
        source.assert_well();
    }
    // The same guest can still move.
    let (destination, address) = Machine::incoming_with(&folder, "last", &[FLAG]);
    let report = broken(&source, &address, &[FLAG], 1);
    assert!(report.status.success() && lost(&report).len() == 1, "{report:?}");
    assert!(source.wait());
    destination.assert_well();
}
