//! Deltas of machines of QEMU: captured while they run, merged, loaded by QEMU, sent to the older one.

use std::path::{Path, PathBuf};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};
use serde_json::json;

use crate::kit::{
    ALL_CHECKED, Program, file_uri, first_difference, folder, machine, memory, multifd, path, run, runs_on,
    send, source, stored_memory,
};

/// Captures the guest through a second QMP socket while it runs, and leaves it stopped. Returns its memory.
fn night(from: &mut Vm, qmp: &Path, base: Option<&Path>, file: &Path) -> Result<Vec<u8>, Error> {
    let mut command = multifd(["capture", "--leave-paused"]);
    if let Some(base) = base {
        command.arg("--base").arg(base);
    }
    Program::start(command.arg(qmp).arg(file)).done();
    let memory = memory(from)?;
    from.cont()?;
    let at = from.round()?.unwrap_or_default();
    from.wait_round(at + ALL_CHECKED, PATIENCE)?;
    Ok(memory)
}

/// QEMU 10.0 loads a whole file, and its guest checks all of its memory.
fn loads(file: &Path, machine_type: &str, before: &[u8], from: &Vm) -> Result<(), Error> {
    let Some(new) = Qemu::v10_0() else { return Ok(()) };
    let mut to = machine(&new, machine_type).incoming().paused().start()?;
    to.set_capabilities(&[("mapped-ram", true)])?;
    to.set_multifd_channels(2)?;
    to.migrate_incoming(&file_uri(file))?;
    to.wait_migration("completed", PATIENCE)?;
    assert_eq!(first_difference(before, &memory(&mut to)?), None, "page, source and destination");
    to.cont()?;
    runs_on(from, &mut to)
}

/// A guest is captured on four nights. Each of the deltas is sent to both QEMUs, and merged for one that loads it.
fn nights(qemu: &Qemu, machine_type: &str) -> Result<(), Error> {
    let folder = folder();
    let qmp = path(&folder, "qmp");
    let args = ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())];
    let mut from = source(machine(qemu, machine_type).args(args))?;
    let mut files: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for number in 0..4 {
        let file = path(&folder, &format!("night{number}"));
        let base = files.last().map(|(file, _)| file.clone());
        let memory = night(&mut from, &qmp, base.as_deref(), &file)?;
        files.push((file, memory));
    }
    from.stop()?;
    for (number, (file, before)) in files.iter().enumerate().rev().step_by(2) {
        let merged = path(&folder, &format!("merged{number}"));
        let ended = run(["merge".as_ref(), file.as_os_str(), merged.as_os_str()]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!(first_difference(before, &stored_memory(&merged)), None, "page, source and merged file");
        loads(&merged, machine_type, before, &from)?;
        for to in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
            if to.series() == "7.2" && machine_type.ends_with("10.0") {
                continue;
            }
            let mut to = machine(&to, machine_type).incoming().paused().start()?;
            to.set_multifd_channels(4)?;
            send(&["--multifd-channels", "4"], file, &mut to, "tcp:127.0.0.1:0")?;
            assert_eq!(first_difference(before, &memory(&mut to)?), None, "page, source and destination");
            to.cont()?;
            runs_on(&from, &mut to)?;
        }
    }
    Ok(())
}

#[test]
fn nights_of_10_0_are_merged_loaded_and_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    nights(&qemu, "pc-q35-7.2").unwrap();
}

#[test]
fn nights_of_7_2_are_merged_loaded_and_sent() {
    let Some(qemu) = Qemu::v7_2() else { return };
    nights(&qemu, "pc-q35-7.2").unwrap();
}

/// Neither QEMU takes a delta for a machine: with mapped-ram, with channels, as a stream.
#[test]
fn delta_is_refused_by_every_qemu() {
    fn refused(qemu: &Qemu, delta: &Path, whole: &Path) -> Result<(), Error> {
        let stream = |file: &Path| format!("exec:cat {}", file.display());
        for (uri, capabilities) in [
            (file_uri(delta), &[("mapped-ram", true)][..]),
            (file_uri(delta), &[("mapped-ram", true), ("multifd", true)]),
            (file_uri(delta), &[]),
            (stream(delta), &[]),
        ] {
            // 7.2 has neither the capability nor the address.
            if qemu.series() == "7.2" && (uri.starts_with("file:") || !capabilities.is_empty()) {
                continue;
            }
            let mut to = machine(qemu, "pc-q35-7.2").incoming().start()?;
            to.set_capabilities(capabilities)?;
            to.execute("migrate-incoming", json!({ "uri": uri }))?;
            to.wait_end(PATIENCE)?;
            let told = to.stderr();
            assert!(told.contains("Unsupported migration stream version"), "{uri}: {told}");
        }
        if qemu.series() != "7.2" {
            let mut to = machine(qemu, "pc-q35-7.2").incoming().start()?;
            to.set_capabilities(&[("mapped-ram", true)])?;
            to.execute("migrate-incoming", json!({ "uri": file_uri(whole) }))?;
            to.wait_migration("completed", PATIENCE)?;
        }
        Ok(())
    }
    let Some(new) = Qemu::v10_0() else { return };
    let folder = folder();
    let (qmp, base, delta) = (path(&folder, "qmp"), path(&folder, "base"), path(&folder, "delta"));
    let args = ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())];
    let mut from = source(machine(&new, "pc-q35-7.2").args(args)).unwrap();
    night(&mut from, &qmp, None, &base).unwrap();
    night(&mut from, &qmp, Some(&base), &delta).unwrap();
    for qemu in [Some(new), Qemu::v7_2()].into_iter().flatten() {
        refused(&qemu, &delta, &base).unwrap_or_else(|error| panic!("QEMU {}: {error}", qemu.series()));
    }
}
