//! A source whose connections break after its switch to post-copy: it returns, and nothing of its guest is lost.

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use multifd_testkit::{
    lacks,
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use serde_json::json;

use super::switched::{
    ENDLESS, LOCAL, advised, advised_over_tls, assert_runs, busy, has_both, inspected, with_both,
};
use crate::kit::{Program, assert_left, first_difference, folder, memory, multifd, path, stored_memory};

/// Lets a source switch to post-copy that then needs seconds for the rest.
fn switch_slowly(from: &mut Vm, address: &str) -> Result<(), Error> {
    from.set_parameters(json!({ "max-postcopy-bandwidth": 1_000_000 }))?;
    from.migrate(address)?;
    from.wait_passes(2, PATIENCE)?;
    from.execute("migrate-start-postcopy", json!({}))?;
    from.wait_migration("postcopy-active", PATIENCE).map(drop)
}

/// Waits until the source sends pages after its devices. Before that, QEMU 7.2 takes its guest back when the connection breaks.
fn wait_pages(from: &mut Vm) -> Result<(), Error> {
    let mut sent = || Ok::<_, Error>(from.query_migrate()?["ram"]["postcopy-bytes"].as_u64());
    let (before, begun) = (sent()?, Instant::now());
    while sent()? <= before {
        assert!(begun.elapsed() < PATIENCE, "no page was sent");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn resume(from: &mut Vm, address: &str) -> Result<(), Error> {
    from.wait_migration("postcopy-paused", PATIENCE)?;
    from.execute("migrate", json!({ "uri": address, "resume": true })).map(drop)
}

/// The connections break some times, and the source returns each time.
fn comes_back(from: &mut Vm, address: &str) -> Result<(), Error> {
    for pause in 0..3 {
        wait_pages(from)?;
        sleep(Duration::from_millis(100 * pause));
        from.execute("migrate-pause", json!({}))?;
        resume(from, address)?;
        from.wait_migration("postcopy-active", PATIENCE)?;
    }
    from.set_parameters(json!({ "max-postcopy-bandwidth": 0 }))?;
    from.wait_migration("completed", PATIENCE).map(drop)
}

fn assert_stored(from: &mut Vm, file: &Path) -> Result<(), Error> {
    let before = memory(from)?;
    assert_eq!(first_difference(&before, &stored_memory(file)), None, "page, source and file");
    assert_eq!(inspected(file)["split-by-footers"], json!(true));
    Ok(())
}

fn source_returns(qemu: &Qemu, preempt: bool) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = advised(qemu, &qemu.machine(), preempt)?;
    let (receive, address) = Program::receive(&["--json"], LOCAL, &file);
    switch_slowly(&mut from, &address)?;
    comes_back(&mut from, &address)?;
    let ended = receive.done();
    let said = ended.stderr.matches("waiting for that QEMU to resume").count();
    assert_eq!(said, 3, "{ended:?}");
    assert_eq!(ended.json()["status"], json!("completed"));
    assert_stored(&mut from, &file)
}

#[test]
fn source_returns_after_broken_connections() {
    with_both(|qemu| source_returns(qemu, false));
}

#[test]
fn source_with_preempt_returns_after_broken_connections() {
    with_both(|qemu| source_returns(qemu, true));
}

#[test]
fn source_returns_over_tls() {
    with_both(|qemu| {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = advised_over_tls(qemu, folder.path())?;
        let options = ["--tls-creds", folder.path().to_str().expect("text")];
        let (receive, address) = Program::receive(&options, LOCAL, &file);
        switch_slowly(&mut from, &address)?;
        comes_back(&mut from, &address)?;
        receive.done();
        assert_stored(&mut from, &file)
    });
}

/// `capture` lets QEMU return by itself.
#[test]
fn capture_continues_after_broken_connections() {
    with_both(|qemu| {
        let folder = folder();
        let (qmp, file) = (path(&folder, "qmp"), path(&folder, "machine"));
        let mut from = busy(qemu, &qmp)?;
        let mut command = multifd(["capture", "--json", "--postcopy-after", "1"]);
        let capture = Program::start(command.args(ENDLESS).arg(&qmp).arg(&file));
        from.wait_passes(1, PATIENCE)?;
        from.set_parameters(json!({ "max-postcopy-bandwidth": 250_000 }))?;
        for _ in 0..2 {
            from.wait_migration("postcopy-active", PATIENCE)?;
            // Before it has sent its devices, QEMU 7.2 takes its guest back.
            sleep(Duration::from_millis(300));
            from.execute("yank", json!({ "instances": [{ "type": "migration" }] }))?;
            // QEMU itself may be paused for a moment only.
            while !capture.next_line().contains("waiting for that QEMU to resume") {}
        }
        from.wait_migration("postcopy-active", PATIENCE)?;
        from.set_parameters(json!({ "max-postcopy-bandwidth": 0 }))?;
        capture.done();
        assert_runs(&mut from)?;
        assert_eq!(inspected(&file)["split-by-footers"], json!(true));
        Ok(())
    });
}

/// With channels, which QEMU 10.1 and later can have together with post-copy.
#[test]
fn source_with_channels_returns_after_broken_connections() {
    with_both(|qemu| {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = advised(qemu, &qemu.machine(), false)?;
        if !has_both(&mut from)? {
            lacks("QEMU 10.1 or later in place of 10.0, with channels together with post-copy");
            return Ok(());
        }
        from.set_multifd_channels(2)?;
        let (receive, address) = Program::receive(&[], LOCAL, &file);
        switch_slowly(&mut from, &address)?;
        comes_back(&mut from, &address)?;
        receive.done();
        assert_stored(&mut from, &file)
    });
}

/// A source that does not return is waited for until the limit.
#[test]
fn source_that_does_not_return_is_given_up() {
    with_both(|qemu| {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = advised(qemu, &qemu.machine(), true)?;
        let (receive, address) = Program::receive(&["--pause-timeout", "1"], LOCAL, &file);
        switch_slowly(&mut from, &address)?;
        wait_pages(&mut from)?;
        from.execute("migrate-pause", json!({}))?;
        from.wait_migration("postcopy-paused", PATIENCE)?;
        receive.end().assert_failed(1, &["after its switch to post-copy", "check query-status"]);
        assert_left(&folder, &[]);
        Ok(())
    });
}
