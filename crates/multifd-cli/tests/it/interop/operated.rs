//! `multifd capture` and `multifd restore`: QEMU is controlled through a second QMP socket, as an operator would do it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder};
use qemu_stream::mapped_ram::MappedRamFile;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::{ALL_CHECKED, Ended, Program, assert_left, folder, machine, multifd, path, source};

/// A machine with a QMP socket for the program.
fn controlled(builder: VmBuilder, qmp: &Path) -> VmBuilder {
    builder.args(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())])
}

/// A guest that runs, its folder, and its QMP socket.
fn guest(qemu: &Qemu) -> Result<(TempDir, PathBuf, Vm), Error> {
    let folder = folder();
    let qmp = path(&folder, "qmp");
    let vm = source(controlled(machine(qemu, &qemu.machine()), &qmp))?;
    Ok((folder, qmp, vm))
}

fn capture(options: &[&str], qmp: &Path, file: &Path) -> Program {
    Program::start(multifd(["capture"]).args(options).arg(qmp).arg(file))
}

fn restore(options: &[&str], file: &Path, qmp: &Path) -> Ended {
    Program::start(multifd(["restore"]).args(options).arg(file).arg(qmp)).end()
}

/// Everything that a capture must put back.
fn settings(vm: &mut Vm) -> Result<(Value, Value), Error> {
    let capabilities = vm.execute("query-migrate-capabilities", json!({}))?;
    Ok((capabilities, vm.execute("query-migrate-parameters", json!({}))?))
}

/// The guest runs on, and finds all of its memory right.
fn assert_runs(vm: &mut Vm) -> Result<(), Error> {
    let at = vm.round()?.unwrap_or_default();
    vm.wait_round(at + ALL_CHECKED, PATIENCE)?;
    assert_eq!(vm.run_state()?, "running");
    Ok(())
}

fn with_both(test: impl Fn(&Qemu) -> Result<(), Error>) {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        test(&qemu).unwrap_or_else(|error| panic!("QEMU {}: {error}", qemu.series()));
    }
}

#[test]
fn guest_is_captured_continues_and_its_file_is_restored() {
    with_both(|qemu| {
        let (folder, qmp, mut from) = guest(qemu)?;
        from.set_capabilities(&[("xbzrle", true)])?;
        from.set_parameters(json!({ "multifd-channels": 7, "max-bandwidth": 33 << 20 }))?;
        let before = settings(&mut from)?;
        let file = path(&folder, "machine");
        for channels in ["4", "0"] {
            let options = ["--json", "--force", "--multifd-channels", channels];
            let ended = capture(&options, &qmp, &file).done();
            let report = ended.json();
            assert_eq!(report["status"], json!("completed"), "{report}");
            assert!(report["downtime"].as_u64().is_some_and(|ms| ms > 0), "{report}");
            assert!(report["ram"]["dirty-sync-count"].as_u64().is_some_and(|n| n > 1), "{report}");
            assert_eq!(report["channels"].as_array().map(Vec::len), channels.parse().ok(), "{report}");
            assert_eq!(settings(&mut from)?, before, "{channels} channels");
            assert_runs(&mut from)?;
            assert_left(&folder, &["machine", "qmp"]);

            let to_qmp = path(&folder, "to");
            let mut to = controlled(machine(qemu, &qemu.machine()), &to_qmp).incoming().start()?;
            let before = settings(&mut to)?;
            let ended = restore(&["--multifd-channels", channels], &file, &to_qmp);
            assert_eq!(ended.code, Some(0), "{ended:?}");
            assert!(ended.stderr.contains("the guest runs"), "{ended:?}");
            assert_runs(&mut to)?;
            assert_eq!(settings(&mut to)?, before);
            drop(to);
            fs::remove_file(to_qmp).unwrap();
        }
        Ok(())
    });
}

#[test]
fn paused_guest_stays_paused_and_what_the_user_asks_for_is_done() {
    with_both(|qemu| {
        let (folder, qmp, mut vm) = guest(qemu)?;
        let file = path(&folder, "machine");
        let told = path(&folder, "told");
        let command =
            format!("test -s \"$MULTIFD_FILE\" && echo \"$MULTIFD_FILE\" > {}; exit 3", told.display());
        let ended = capture(&["--before-continue", &command], &qmp, &file).end();
        ended.assert_failed(1, &["is complete, but the command before cont failed", "exit status: 3"]);
        assert_eq!(fs::read_to_string(&told).unwrap().trim(), file.to_str().unwrap());
        assert_runs(&mut vm)?;

        capture(&["--force", "--leave-paused"], &qmp, &file).done();
        assert_ne!(vm.run_state()?, "running");
        let again = capture(&["--force"], &qmp, &file).end();
        again.assert_failed(1, &["only after cont"]);
        vm.cont()?;
        assert_runs(&mut vm)?;

        vm.stop()?;
        let ended = capture(&["--force"], &qmp, &file).done();
        assert!(ended.stderr.contains("the guest is stopped"), "{ended:?}");
        assert_ne!(vm.run_state()?, "running");
        vm.cont()?;

        let ended = capture(&["--force", "--quit"], &qmp, &file).done();
        assert!(ended.stderr.contains("QEMU has ended"), "{ended:?}");
        assert!(vm.wait_end(PATIENCE)?.success());

        let mut to = controlled(machine(qemu, &qemu.machine()), &qmp).incoming().start()?;
        let ended = restore(&["--paused"], &file, &qmp);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!(to.run_state()?, "paused");
        to.cont()?;
        assert_runs(&mut to)
    });
}

/// A capture that is interrupted, killed at the disk, or cancelled at QEMU leaves the guest as it was, and no file.
#[test]
fn capture_that_fails_leaves_the_guest_running_its_settings_and_no_file() {
    with_both(|qemu| {
        let (folder, qmp, mut vm) = guest(qemu)?;
        let before = settings(&mut vm)?;
        let file = path(&folder, "machine");
        let endless = ["--max-bandwidth", "1M", "--multifd-channels", "2"];
        type Disturb = fn(&Program, &mut Vm) -> Result<(), Error>;
        let disturbances: [(&str, Disturb, i32, &[&str]); 3] = [
            (
                "interrupt",
                |program, _| {
                    program.signal(Signal::INT);
                    Ok(())
                },
                130,
                &["interrupted"],
            ),
            ("cancelled", |_, vm| vm.execute("migrate_cancel", json!({})).map(drop), 1, &["failed"]),
            (
                "full",
                |program, _| {
                    program.limit_file_size(1 << 20);
                    Ok(())
                },
                1,
                &["failed", "File too large"],
            ),
        ];
        for (name, disturb, code, words) in disturbances {
            let program = capture(&endless, &qmp, &file);
            while vm.query_migrate()?["ram"]["transferred"].as_u64().unwrap_or(0) < 200_000 {
                std::thread::sleep(Duration::from_millis(20));
            }
            disturb(&program, &mut vm)?;
            let ended = program.end();
            ended.assert_failed(code, words);
            assert_runs(&mut vm)?;
            assert_eq!(settings(&mut vm)?, before, "{name}");
            assert_left(&folder, &["qmp"]);
        }
        Ok(())
    });
}

#[test]
fn machine_that_differs_is_named_before_anything_is_sent() {
    with_both(|qemu| {
        let (folder, qmp, vm) = guest(qemu)?;
        let file = path(&folder, "machine");
        capture(&[], &qmp, &file).done();
        drop(vm);
        fs::remove_file(&qmp).unwrap();
        let other = qemu.vm().machine("pc-q35-6.2").memory(64 << 20).args(["-smp", "3"]);
        let mut to = controlled(other, &qmp).incoming().start()?;
        let ended = restore(&[], &file, &qmp);
        let type_here = format!("machine type: {} in the file, pc-q35-6.2 in QEMU", qemu.machine());
        ended.assert_failed(
            1,
            &["does not fit", &type_here, "RAM: ", "processors: 1 in the file, 3 in QEMU (-smp)"],
        );
        assert_eq!(to.run_state()?, "inmigrate", "nothing was sent");
        Ok(())
    });
}

#[test]
fn qemu_in_another_state_and_another_socket_are_refused_with_the_reason() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (folder, qmp, mut vm) = guest(&qemu).unwrap();
    let file = path(&folder, "machine");
    capture(&[], &qmp, &file).done();
    let wrong = restore(&[], &file, &qmp);
    wrong.assert_failed(1, &["its guest is running: start QEMU with -incoming defer"]);
    let gone = path(&folder, "gone");
    capture(&["--force"], &gone, &file)
        .end()
        .assert_failed(1, &["cannot connect to QMP at unix:", "No such file"]);
    // QEMU serves one client at a socket.
    let _first = std::os::unix::net::UnixStream::connect(&qmp).unwrap();
    let busy = capture(&["--force"], &qmp, &file).end();
    busy.assert_failed(1, &["another program, such as libvirt, is probably connected"]);
    assert_runs(&mut vm).unwrap();
}

/// Regression: `capture qmp FILE` in the folder of the socket failed, because the folder of a bare name is empty.
#[test]
fn qmp_socket_in_the_current_folder_needs_no_path() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (folder, _qmp, mut vm) = guest(&qemu).unwrap();
    Program::start(multifd(["capture", "qmp", "machine"]).current_dir(folder.path())).done();
    assert_left(&folder, &["machine", "qmp"]);
    assert_runs(&mut vm).unwrap();
}

/// QMP at TCP, so that both sides meet at the addresses of its connection.
#[test]
fn qmp_over_tcp_needs_no_address_for_the_migration() {
    with_both(|qemu| {
        let folder = folder();
        let port =
            || std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).unwrap().port();
        let (here, there) = (format!("tcp:127.0.0.1:{}", port()), format!("tcp:127.0.0.1:{}", port()));
        let at = |builder: VmBuilder, qmp: &str| {
            builder.args(["-qmp".to_owned(), format!("{qmp},server=on,wait=off")])
        };
        let file = path(&folder, "machine");
        let mut from = source(at(machine(qemu, &qemu.machine()), &here))?;
        capture(&[], Path::new(&here), &file).done();
        assert_runs(&mut from)?;
        let mut to = at(machine(qemu, &qemu.machine()), &there).incoming().start()?;
        let ended = restore(&[], &file, Path::new(&there));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_runs(&mut to)
    });
}

/// Asserts that a guest was captured as if nothing had happened to it: it runs and finds all of its memory right, its QEMU has
/// its settings, and the folder contains the file and nothing else.
fn assert_captured(folder: &TempDir, vm: &mut Vm, before: &(Value, Value)) -> Result<(), Error> {
    assert_left(folder, &["machine", "qmp"]);
    MappedRamFile::open(fs::File::open(path(folder, "machine")).expect("the file"), 0).expect("a whole file");
    assert_eq!(settings(vm)?, *before);
    assert_runs(vm)
}

#[test]
fn fifty_guests_in_a_row_are_captured_and_run() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for at in 0..50 {
        let (folder, qmp, mut vm) = guest(&qemu).unwrap();
        let before = settings(&mut vm).unwrap();
        capture(&["--quiet"], &qmp, &path(&folder, "machine")).done();
        assert_captured(&folder, &mut vm, &before).unwrap_or_else(|error| panic!("guest {at}: {error}"));
    }
}

/// An operator captures the same guest every night, in one life of its QEMU.
#[test]
fn one_guest_is_captured_again_and_again() {
    with_both(|qemu| {
        let (folder, qmp, mut vm) = guest(qemu)?;
        let before = settings(&mut vm)?;
        for _ in 0..20 {
            capture(&["--force", "--quiet"], &qmp, &path(&folder, "machine")).done();
            assert_eq!(vm.run_state()?, "running");
        }
        assert_captured(&folder, &mut vm, &before)
    });
}

#[test]
fn eight_guests_at_once_are_captured_and_run() {
    with_both(|qemu| {
        let mut all = (0..8).map(|_| guest(qemu)).collect::<Result<Vec<_>, _>>()?;
        let before = all.iter_mut().map(|(_, _, vm)| settings(vm)).collect::<Result<Vec<_>, _>>()?;
        let programs: Vec<_> =
            all.iter().map(|(folder, qmp, _)| capture(&[], qmp, &path(folder, "machine"))).collect();
        for ((program, (folder, _, vm)), before) in programs.into_iter().zip(&mut all).zip(&before) {
            program.done();
            assert_captured(folder, vm, before)?;
        }
        Ok(())
    });
}
