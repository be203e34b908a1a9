//! A guest that checks itself continues where it was, whatever happens to its migration.

use std::process::Child;

use multifd_testkit::silent::Silent;

use crate::{
    broken::FLAG,
    kit::{Machine, folder, number, program},
};

/// Moves a machine; returns its count when it left, after checking it at the other side.
fn hop(source: Machine, destination: &Machine, address: &str) -> u64 {
    let report = source.migrate(address, "0").wait_with_output().expect("waited for");
    assert!(report.status.success(), "{report:?}");
    let left_at = number(&report, "batches");
    assert!(source.wait(), "the source's process ends in order when its machine has gone");
    assert!(destination.batches() >= left_at, "the counter goes on");
    destination.assert_well();
    left_at
}

fn end(client: Child) -> String {
    let output = client.wait_with_output().expect("waited for");
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_running_guest_moves_and_counts_on() {
    let Some(folder) = folder() else { return };
    let source = Machine::run(&folder, "source");
    source.assert_well();
    let (destination, address) = Machine::incoming(&folder, "destination");
    let before = source.batches();
    assert!(hop(source, &destination, &address) >= before);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running_and_the_next_one_succeeds() {
    let Some(folder) = folder() else { return };
    let source = Machine::run(&folder, "source");
    let (destination, address) = Machine::incoming(&folder, "cancelled");
    // At least two seconds for the amount it must send.
    let mut client = source.migrate(&address, "20MB");
    destination.wait_resident(16 << 20);
    client.kill().expect("killed");
    client.wait().expect("waited for");
    assert!(!destination.wait(), "a destination without a machine fails");
    source.assert_well();
    let (destination, address) = Machine::incoming(&folder, "destination");
    hop(source, &destination, &address);
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_running_and_the_next_one_gets_it() {
    let Some(folder) = folder() else { return };
    let source = Machine::run(&folder, "source");
    let (destination, address) = Machine::incoming(&folder, "killed");
    let client = source.migrate(&address, "20MB");
    destination.wait_resident(16 << 20);
    destination.kill();
    let said = end(client);
    assert!(said.contains("error"), "{said}");
    source.assert_well();
    let (destination, address) = Machine::incoming(&folder, "destination");
    hop(source, &destination, &address);
}

#[test]
fn a_destination_that_is_not_there_is_told_and_the_guest_runs_on() {
    let Some(folder) = folder() else { return };
    let source = Machine::run(&folder, "source");
    let (destination, address) = Machine::incoming(&folder, "gone");
    destination.kill();
    let said = end(source.migrate(&address, "0"));
    assert!(said.contains(&format!("connect to {address}")), "{said}");
    source.assert_well();
}

#[test]
fn a_destination_that_reads_nothing_is_given_up_and_the_guest_runs_on() {
    let Some(folder) = folder() else { return };
    let source = Machine::run(&folder, "source");
    let data = "the other side has accepted no data for 1 s";
    // It waits for a reply before the first pass.
    let reply =
        "nothing arrived in time where the reply to a question was expected; the guest stays at the source";
    for (channels, more, why) in [("0", None, data), ("4", None, data), ("4", Some(FLAG), reply)] {
        let silent = Silent::start(None).expect("listening");
        let flags = ["--channels", channels, "--stall-timeout", "1000"];
        let flags: Vec<_> = flags.into_iter().chain(more).collect();
        let said = end(source.migrate_with(&silent.address(), &flags));
        assert!(said.contains(why), "{said}");
        source.assert_well();
    }
}

/// With a limit that even a busy machine does not exceed: the duration is not tested.
#[test]
fn the_demo_finds_no_wrong_byte() {
    let Some(_folder) = folder() else { return };
    let arguments = ["demo", "--size", "64MiB", "--rate", "20MB", "--downtime-limit", "60000"];
    let demo = program().args(arguments).output().expect("run");
    let said = String::from_utf8_lossy(&demo.stdout);
    assert!(demo.status.success() && said.contains("\n0 wrong bytes of 66060288\n"), "{demo:?}");
}

/// It rewrites all of its memory during a pass, and is never stopped unless it is throttled.
#[test]
fn a_guest_that_writes_faster_than_is_sent_moves_when_it_is_held_back() {
    let Some(folder) = folder() else { return };
    let source = Machine::run_at(&folder, "source", "400MB");
    let (destination, address) = Machine::incoming(&folder, "destination");
    let report = source.migrate_with(&address, &["--max-bandwidth=60MB", "--auto-converge"]);
    let report = report.wait_with_output().expect("waited for");
    assert!(report.status.success(), "{report:?}");
    assert!(number(&report, "throttled") >= 20, "{report:?}");
    assert!(source.wait(), "the source's process ends in order when its machine has gone");
    assert!(destination.batches() >= number(&report, "batches"), "the counter goes on");
    destination.assert_well();
}

#[test]
fn ten_hops_back_and_forth_lose_nothing() {
    let Some(folder) = folder() else { return };
    let mut machine = Machine::run(&folder, "start");
    let mut counted = machine.batches();
    for hop_number in 0..10 {
        let (next, address) = Machine::incoming(&folder, &format!("hop{hop_number}"));
        let left_at = hop(machine, &next, &address);
        assert!(left_at >= counted, "hop {hop_number}: {left_at} after {counted}");
        (machine, counted) = (next, left_at);
    }
}
