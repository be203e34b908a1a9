//! A source that switches to post-copy: its guest is stored, and runs on from the file in every way.

use std::{path::Path, thread::sleep, time::Duration};

use multifd_testkit::{
    certificates::write_both,
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::journey::with_tls;
use crate::kit::{
    ALL_CHECKED, Ended, Program, assert_left, fast, file_uri, first_difference, folder, machine, memory,
    multifd, path, run, runs_on, send, slow, source, stored_memory,
};

pub(super) const LOCAL: &str = "tcp:127.0.0.1:0";

/// A source with capability `postcopy-ram` on, of which a pass takes longer than it may.
pub(super) fn advised(qemu: &Qemu, kind: &str, preempt: bool) -> Result<Vm, Error> {
    let mut from = source(machine(qemu, kind))?;
    from.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)])?;
    slow(&mut from)?;
    Ok(from)
}

/// The same with `postcopy-preempt` and TLS on both connections. The certificates of both sides are in `folder`.
pub(super) fn advised_over_tls(qemu: &Qemu, folder: &Path) -> Result<Vm, Error> {
    write_both(folder).expect("certificates");
    let mut from = source(with_tls(machine(qemu, &qemu.machine()), folder, "client"))?;
    from.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", true)])?;
    from.set_parameters(json!({ "tls-creds": "tls0" }))?;
    slow(&mut from)?;
    Ok(from)
}

/// Migrates a running guest that would never converge, by post-copy. Returns its memory at the stop.
fn switch(from: &mut Vm, address: &str) -> Result<Vec<u8>, Error> {
    from.migrate(address)?;
    from.wait_passes(2, PATIENCE)?;
    from.execute("migrate-start-postcopy", json!({}))?;
    let told = from.wait_migration("completed", PATIENCE)?;
    assert_eq!(told["ram"]["postcopy-requests"], json!(0), "{told}");
    memory(from)
}

fn stored(
    qemu: &Qemu,
    kind: &'static str,
    preempt: bool,
    file: &Path,
) -> Result<(Vm, Vec<u8>, Ended), Error> {
    let mut from = advised(qemu, kind, preempt)?;
    let (receive, address) = Program::receive(&["--json"], LOCAL, file);
    let before = switch(&mut from, &address)?;
    let ended = receive.done();
    assert_eq!(first_difference(&before, &stored_memory(file)), None, "page, source and file");
    Ok((from, before, ended))
}

pub(super) fn inspected(file: &Path) -> Value {
    run(["inspect".as_ref(), "--json".as_ref(), file.as_os_str()]).json()
}

/// The file is loaded by QEMU 10.0 itself, and sent into `to`.
fn guest_is_stored_and_runs_on(
    qemu: &Qemu,
    kind: &'static str,
    preempt: bool,
    to: &[Qemu],
) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let (from, _, ended) = stored(qemu, kind, preempt, &file)?;
    assert!(ended.stderr.lines().all(|line| line.starts_with("listening on")), "{ended:?}");
    let told = inspected(&file);
    assert_eq!(told["described"], json!(true), "{told}");
    assert_eq!(told["split-by-footers"], json!(true), "{told}");
    assert!(told["devices"].as_array().is_some_and(|devices| devices.len() > 10), "{told}");
    let lines = run(["inspect".as_ref(), file.as_os_str()]).stdout;
    assert!(lines.contains("the source has not described its devices (post-copy)"), "{lines}");
    for qemu in to {
        let mut there = machine(qemu, kind).incoming().start()?;
        send(&["--multifd-channels", "0"], &file, &mut there, LOCAL)?;
        runs_on(&from, &mut there)?;
    }
    let Some(new) = Qemu::v10_0() else { return Ok(()) };
    let mut there = machine(&new, kind).incoming().start()?;
    there.set_capabilities(&[("mapped-ram", true)])?;
    there.migrate_incoming(&file_uri(&file))?;
    there.wait_migration("completed", PATIENCE)?;
    runs_on(&from, &mut there)?;
    assert!(!there.stderr().contains("vmdescription"), "{}", there.stderr());
    Ok(())
}

pub(super) fn with_both(test: impl Fn(&Qemu) -> Result<(), Error>) {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        test(&qemu).unwrap_or_else(|error| panic!("QEMU {}: {error}", qemu.series()));
    }
}

#[test]
fn guest_of_7_2_is_stored_by_postcopy() {
    let (Some(old), Some(new)) = (Qemu::v7_2(), Qemu::v10_0()) else { return };
    let to = [old.clone(), new];
    guest_is_stored_and_runs_on(&old, "pc-q35-7.2", false, &to).unwrap();
}

#[test]
fn guest_of_7_2_is_stored_by_postcopy_with_preempt() {
    let Some(old) = Qemu::v7_2() else { return };
    guest_is_stored_and_runs_on(&old, "pc-q35-7.2", true, std::slice::from_ref(&old)).unwrap();
}

#[test]
fn guest_of_10_0_is_stored_by_postcopy() {
    let Some(new) = Qemu::v10_0() else { return };
    guest_is_stored_and_runs_on(&new, "pc-q35-10.0", false, std::slice::from_ref(&new)).unwrap();
}

#[test]
fn guest_of_10_0_is_stored_by_postcopy_with_preempt() {
    let (Some(old), Some(new)) = (Qemu::v7_2(), Qemu::v10_0()) else { return };
    guest_is_stored_and_runs_on(&new, "pc-q35-7.2", true, &[old, new.clone()]).unwrap();
}

/// The silent connection of 7.2 is there from the beginning, and must be kept for longer than a connection may be silent that
/// is not expected.
#[test]
fn silent_connection_of_preempt_is_kept_for_as_long_as_the_migration_takes() {
    with_both(|qemu| {
        let folder = folder();
        let file = path(&folder, "machine");
        let kind = qemu.machine();
        let mut from = advised(qemu, &kind, true)?;
        let (receive, address) = Program::receive(&[], LOCAL, &file);
        from.migrate(&address)?;
        // The limit for a connection that does not say what it is: 10 s.
        sleep(Duration::from_secs(12));
        from.execute("migrate-start-postcopy", json!({}))?;
        from.wait_migration("completed", PATIENCE)?;
        receive.done();
        let before = memory(&mut from)?;
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        Ok(())
    });
}

#[test]
fn source_that_may_switch_and_does_not_is_stored_as_any_other() {
    with_both(|qemu| {
        for preempt in [false, true] {
            let folder = folder();
            let file = path(&folder, "machine");
            let kind = qemu.machine();
            let mut from = advised(qemu, &kind, preempt)?;
            let (receive, address) = Program::receive(&[], LOCAL, &file);
            from.migrate(&address)?;
            from.wait_passes(3, PATIENCE)?;
            fast(&mut from)?;
            from.wait_migration("completed", PATIENCE)?;
            receive.done();
            let before = memory(&mut from)?;
            assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
            let told = inspected(&file);
            assert_eq!(told["split-by-footers"], json!(false), "{told}");
        }
        Ok(())
    });
}

#[test]
fn guest_is_stored_by_postcopy_over_tls_on_both_connections() {
    with_both(|qemu| {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = advised_over_tls(qemu, folder.path())?;
        let options = ["--tls-creds", folder.path().to_str().expect("text")];
        let (receive, address) = Program::receive(&options, LOCAL, &file);
        let before = switch(&mut from, &address)?;
        receive.done();
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        Ok(())
    });
}

/// A guest that rewrites its memory faster than it may be sent, so that no pass is the last one.
pub(super) fn busy(qemu: &Qemu, qmp: &Path) -> Result<Vm, Error> {
    source(
        machine(qemu, &qemu.machine())
            .args(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())]),
    )
}

/// The options of a capture that does not end by itself.
pub(super) const ENDLESS: [&str; 4] = ["--max-bandwidth", "3M", "--downtime-limit", "1ms"];

#[test]
fn capture_of_a_guest_that_never_converges_is_bounded() {
    with_both(|qemu| {
        let folder = folder();
        let (qmp, file) = (path(&folder, "qmp"), path(&folder, "machine"));
        let mut from = busy(qemu, &qmp)?;
        let settings = |vm: &mut Vm| {
            let capabilities = vm.execute("query-migrate-capabilities", json!({}))?;
            Ok::<_, Error>((capabilities, vm.execute("query-migrate-parameters", json!({}))?))
        };
        let before = settings(&mut from)?;
        let command = |options: &[&str]| {
            let mut command = multifd(["capture", "--json"]);
            Program::start(command.args(ENDLESS).args(options).arg(&qmp).arg(&file))
        };
        // Without the switch it has not ended by then.
        command(&["--timeout", "12"]).end().assert_failed(1, &["timeout"]);
        assert_runs(&mut from)?;
        let ended = command(&["--postcopy-after", "2", "--timeout", "30"]).done();
        let report = ended.json();
        assert_eq!(report["status"], json!("completed"), "{report}");
        assert!(report["total-time"].as_u64().is_some_and(|time| time >= 1500), "{report}");
        assert!(report["downtime"].as_u64().is_some_and(|time| time > 0), "{report}");
        assert_eq!(report["channels"], json!([]), "{report}");
        assert_eq!(settings(&mut from)?, before);
        assert_runs(&mut from)?;
        assert_eq!(inspected(&file)["split-by-footers"], json!(true));

        assert_restorable(qemu, &file)?;
        // A guest that converges is captured without the switch.
        let mut command = multifd(["capture", "--force", "--postcopy-after", "1h"]);
        Program::start(command.arg(&qmp).arg(&file)).done();
        assert_eq!(inspected(&file)["split-by-footers"], json!(false));
        assert_runs(&mut from)
    });
}

/// QEMU 7.2 must be asked to cancel before it learns of the failure, and 10.0 must learn of it before its connection ends: otherwise
/// both keep the guest stopped for good.
#[test]
fn guest_continues_after_a_capture_that_fails_after_the_switch() {
    type Disturb = fn(&Program);
    let disturbances: [(Disturb, i32, &[&str]); 2] = [
        (
            // Not all of its memory was written before the switch.
            |program| program.limit_file_size(16 << 10),
            1,
            &["File too large", "after its switch to post-copy"],
        ),
        (|program| program.signal(Signal::INT), 130, &["interrupted"]),
    ];
    with_both(|qemu| {
        for (disturb, code, told) in disturbances {
            let folder = folder();
            let (qmp, file) = (path(&folder, "qmp"), path(&folder, "machine"));
            let mut from = busy(qemu, &qmp)?;
            let mut command = multifd(["capture", "--postcopy-after", "1"]);
            let capture = Program::start(command.args(ENDLESS).arg(&qmp).arg(&file));
            from.wait_passes(1, PATIENCE)?;
            from.set_parameters(json!({ "max-postcopy-bandwidth": 3_000_000 }))?;
            from.wait_event("STOP", PATIENCE)?;
            disturb(&capture);
            let ended = capture.end();
            ended.assert_failed(code, told);
            assert!(!ended.stderr.contains("QEMU is not as before"), "{ended:?}");
            assert_runs(&mut from)?;
            assert_left(&folder, &["qmp"]);
            // It can be captured again.
            Program::start(multifd(["capture"]).arg(&qmp).arg(&file)).done();
            assert_runs(&mut from)?;
        }
        Ok(())
    });
}

/// Whether this QEMU can have channels and switch to post-copy: 10.1 and later.
pub(super) fn has_both(vm: &mut Vm) -> Result<bool, Error> {
    let version = vm.execute("query-version", json!({}))?;
    let number = |name: &str| version["qemu"][name].as_u64();
    Ok((number("major"), number("minor")) >= (Some(10), Some(1)))
}

#[test]
fn channels_together_with_the_switch_are_used_or_refused_before_anything_is_changed() {
    with_both(|qemu| {
        let folder = folder();
        let (qmp, file) = (path(&folder, "qmp"), path(&folder, "machine"));
        let mut from = busy(qemu, &qmp)?;
        let mut command = multifd(["capture", "--json", "--postcopy-after", "2", "--multifd-channels", "2"]);
        let capture = Program::start(command.args(ENDLESS).arg(&qmp).arg(&file));
        if has_both(&mut from)? {
            let report = capture.done().json();
            assert_eq!(report["channels"].as_array().map(Vec::len), Some(2), "{report}");
            assert_eq!(inspected(&file)["split-by-footers"], json!(true));
            assert_restorable(qemu, &file)?;
            return assert_runs(&mut from);
        }
        let ended = capture.end();
        ended.assert_failed(1, &["use --multifd-channels 0", "10.1"]);
        assert!(!file.exists());
        assert_runs(&mut from)
    });
}

/// The guest of the file runs in a new QEMU.
fn assert_restorable(qemu: &Qemu, file: &Path) -> Result<(), Error> {
    let folder = folder();
    let qmp = path(&folder, "to");
    let mut to = machine(qemu, &qemu.machine())
        .args(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())])
        .incoming()
        .start()?;
    Program::start(multifd(["restore"]).arg(file).arg(&qmp)).done();
    assert_runs(&mut to)
}

/// The guest runs on, and finds all of its memory right.
pub(super) fn assert_runs(vm: &mut Vm) -> Result<(), Error> {
    let at = vm.round()?.unwrap_or_default();
    vm.wait_round(at + ALL_CHECKED, PATIENCE).map(drop)
}

#[test]
fn source_that_is_killed_after_the_switch_leaves_no_file_and_the_error_says_what_to_do() {
    with_both(|qemu| {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = advised(qemu, &qemu.machine(), true)?;
        from.set_parameters(json!({ "max-postcopy-bandwidth": 1_000_000 }))?;
        // The end of its process looks like a broken network.
        let (receive, address) = Program::receive(&["--pause-timeout", "1"], LOCAL, &file);
        from.migrate(&address)?;
        from.wait_passes(2, PATIENCE)?;
        from.execute("migrate-start-postcopy", json!({}))?;
        from.wait_event("STOP", PATIENCE)?;
        // The package is sent immediately after it.
        from.wait_migration("postcopy-active", PATIENCE)?;
        sleep(Duration::from_millis(300));
        from.kill()?;
        receive.end().assert_failed(1, &["after its switch to post-copy", "check query-status"]);
        assert_left(&folder, &[]);
        Ok(())
    });
}
