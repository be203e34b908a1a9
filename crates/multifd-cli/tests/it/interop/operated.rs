//! `multifd capture` and `multifd restore`: QEMU is controlled through a second QMP socket, as an operator would do it.

use std::{
    fs,
    io::{self, BufRead, BufReader},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use multifd::ram::BlockIndex;
use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder};
use qemu_stream::mapped_ram::MappedRamFile;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    kit::{
        ALL_CHECKED, Ended, Program, assert_left, first_difference, folder, machine, memory, multifd, path,
        run, source,
    },
    metrics::read_metrics,
};

/// A machine with a QMP socket for the program.
pub(super) fn controlled(builder: VmBuilder, qmp: &Path) -> VmBuilder {
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

/// The commands are typed as `inspect` prints them, into a shell.
#[test]
fn file_says_whose_it_is_and_its_printed_commands_restore_it() {
    with_both(|qemu| {
        let folder = folder();
        let (qmp, file) = (path(&folder, "qmp"), path(&folder, "machine"));
        let named = machine(qemu, &qemu.machine()).args(["-name", "it's web01"]);
        let from = source(controlled(named, &qmp))?;
        capture(&["--quit", "--label", "before the upgrade"], &qmp, &file).done();
        let ended = run(["verify".as_ref(), file.as_os_str()]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let told = run(["inspect".as_ref(), "--json".as_ref(), file.as_os_str()]).json();
        let about = &told["about"];
        assert!(about["qemu"].as_str().is_some_and(|version| version.starts_with(qemu.series())), "{about}");
        assert_eq!(about["guest-name"], "it's web01");
        assert_eq!(about["guest-state"], "running");
        assert_eq!(about["label"], "before the upgrade");
        assert_eq!(about["processors"], 1);
        assert!(about["stopped-for"].is_u64(), "{about}");

        let commands: Vec<&str> =
            told["restore"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let [waits, restores] = commands[..] else { panic!("{commands:?}") };
        let script = format!("{waits}\necho $!\nexec {restores}");
        let program = Path::new(env!("CARGO_BIN_EXE_multifd"));
        let search = format!("{}:/usr/bin:/bin", program.parent().unwrap().display());
        let script = script.replacen(
            "\nexec",
            &format!("\nuntil test -S {}; do sleep 0.1; done\nexec", qmp.display()),
            1,
        );
        // QEMU removes its socket when it ends. The folder with its files is still there.
        let begun = Instant::now();
        while qmp.exists() {
            assert!(begun.elapsed() < PATIENCE, "QEMU has not ended");
            sleep(Duration::from_millis(20));
        }
        let mut shell = Command::new("sh");
        // What the tests' own QEMU has in its environment, and an installed one has not.
        let modules = qemu.program().parent().unwrap().join("root/usr/lib/x86_64-linux-gnu/qemu");
        shell.env("QEMU_MODULE_DIR", modules);
        shell.args(["-c", &script]).env("PATH", search).stdin(Stdio::null()).stderr(Stdio::piped());
        let ended = shell.stdout(Stdio::piped()).spawn().and_then(wait_for_shell).expect("a shell");
        let restored =
            Pid::from_raw(ended.0.trim().parse().unwrap_or_else(|_| panic!("{script}\n{ended:?}")))
                .expect("a process");
        assert!(ended.1.contains("the guest runs"), "{script}\n{ended:?}");
        kill_process(restored, Signal::KILL).expect("QEMU is there");
        drop(from);
        Ok(())
    });
}

#[test]
fn damaged_file_is_not_restored_unless_that_is_wanted() {
    with_both(|qemu| {
        let (folder, qmp, from) = guest(qemu)?;
        let file = path(&folder, "machine");
        capture(&["--quit"], &qmp, &file).done();
        drop(from);
        let machine_of = |file: &Path| MappedRamFile::open_damaged(fs::File::open(file).unwrap(), 0).unwrap();
        let present = machine_of(&file).bitmap(BlockIndex(0)).unwrap();
        // Beyond what the guest of these tests looks at when it continues.
        let (page, _) = present.set_runs().last().expect("a page");
        let at = machine_of(&file).place(BlockIndex(0)).unwrap().page_offset(page).unwrap();
        let bytes = fs::File::options().read(true).write(true).open(&file).unwrap();
        let mut byte = [0];
        bytes.read_exact_at(&mut byte, at + 7).unwrap();
        bytes.write_all_at(&[byte[0] ^ 4], at + 7).unwrap();
        for (option, code) in [(&[][..], Some(1)), (&["--no-verify"], Some(0))] {
            let to_qmp = path(&folder, "to");
            let to = controlled(machine(qemu, &qemu.machine()), &to_qmp).incoming().start()?;
            let ended = restore(option, &file, &to_qmp);
            assert_eq!(ended.code, code, "{ended:?}");
            let told =
                ended.stderr.contains("differs from its digest") && ended.stderr.contains("--no-verify");
            assert_eq!(told, option.is_empty(), "{ended:?}");
            drop(to);
            let _ = fs::remove_file(to_qmp);
        }
        Ok(())
    });
}

/// The first line of a shell's output, which a process in its background keeps open, and its messages.
fn wait_for_shell(mut shell: Child) -> io::Result<(String, String)> {
    let mut first = String::new();
    BufReader::new(shell.stdout.take().expect("piped")).read_line(&mut first)?;
    let mut messages = String::new();
    for line in BufReader::new(shell.stderr.take().expect("piped")).lines() {
        messages += &line?;
        messages += "\n";
        if messages.contains("the guest ") || messages.contains("multifd: ") {
            break;
        }
    }
    shell.wait()?;
    Ok((first, messages))
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
            let numbers = path(&folder, "numbers.prom");
            let metrics = ["--metrics", numbers.to_str().unwrap()];
            let options = ["--json", "--force", "--multifd-channels", channels];
            let ended = capture(&[&options[..], &metrics].concat(), &qmp, &file).done();
            let page = read_metrics(&numbers);
            assert_eq!(page.one("exit_code", &[("verb", "capture")]), Some(0.0), "{page:?}");
            assert!(page.one("downtime_seconds", &[]).is_some_and(|time| time > 0.0), "{page:?}");
            assert!(page.one("passes", &[]).is_some_and(|passes| passes > 1.0), "{page:?}");
            fs::remove_file(&numbers).unwrap();
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
            let ended = restore(&[&metrics[..], &["--multifd-channels", channels]].concat(), &file, &to_qmp);
            assert_eq!(ended.code, Some(0), "{ended:?}");
            let page = read_metrics(&numbers);
            assert_eq!(
                page.one("status", &[("verb", "restore"), ("status", "completed")]),
                Some(1.0),
                "{page:?}"
            );
            fs::remove_file(&numbers).unwrap();
            assert!(ended.stderr.contains("the guest runs"), "{ended:?}");
            assert_runs(&mut to)?;
            assert_eq!(settings(&mut to)?, before);
            drop(to);
            fs::remove_file(to_qmp).unwrap();
        }
        Ok(())
    });
}

/// A chain of three files, through QMP. Without its base, the destination is not touched.
#[test]
fn guest_is_restored_out_of_a_chain_of_captures() {
    with_both(|qemu| {
        let (folder, qmp, mut from) = guest(qemu)?;
        let files = ["base", "first", "second"].map(|name| path(&folder, name));
        capture(&[], &qmp, &files[0]).done();
        for (base, delta) in [(0, 1), (1, 2)] {
            assert_runs(&mut from)?;
            let base = ["--base", files[base].to_str().unwrap()];
            // The last one leaves the guest as it is in the file.
            let options = [&base[..], if delta == 2 { &["--leave-paused"] } else { &[] }].concat();
            capture(&options, &qmp, &files[delta]).done();
        }
        let before = memory(&mut from)?;
        for channels in ["4", "0"] {
            let to_qmp = path(&folder, "to");
            let mut to = controlled(machine(qemu, &qemu.machine()), &to_qmp).incoming().start()?;
            let ended = restore(&["--paused", "--multifd-channels", channels], &files[2], &to_qmp);
            assert_eq!(ended.code, Some(0), "{ended:?}");
            assert_eq!(to.run_state()?, "paused");
            assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
            to.cont()?;
            assert_runs(&mut to)?;
            drop(to);
            fs::remove_file(to_qmp).unwrap();
        }
        fs::rename(&files[0], path(&folder, "elsewhere")).unwrap();
        let to_qmp = path(&folder, "to");
        let mut to = controlled(machine(qemu, &qemu.machine()), &to_qmp).incoming().start()?;
        restore(&[], &files[2], &to_qmp).assert_failed(1, &["base"]);
        assert_eq!(to.run_state()?, "inmigrate");
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

#[test]
fn capture_and_restore_are_cancelled_at_the_limit_of_the_run() {
    with_both(|qemu| {
        let (folder, qmp, mut vm) = guest(qemu)?;
        let (before, file) = (settings(&mut vm)?, path(&folder, "machine"));
        let limit = ["--timeout", "2", "--max-bandwidth", "1M", "--multifd-channels", "0"];
        let over = "the whole run was not complete after 2 s";
        capture(&limit, &qmp, &file).end().assert_failed(1, &[over]);
        assert_runs(&mut vm)?;
        assert_eq!(settings(&mut vm)?, before);
        assert_left(&folder, &["qmp"]);

        capture(&["--timeout", "1.5h"], &qmp, &file).done();
        let to_qmp = path(&folder, "to");
        let _to = controlled(machine(qemu, &qemu.machine()), &to_qmp).incoming().start()?;
        restore(&limit, &file, &to_qmp).assert_failed(1, &[over]);
        Ok(())
    });
}

/// `ctl` reaches through to QEMU, whose settings are put back nevertheless.
#[test]
fn limits_of_a_capture_are_changed_at_qemu_and_a_cancel_leaves_the_guest_running() {
    with_both(|qemu| {
        let (folder, qmp, mut vm) = guest(qemu)?;
        let (before, file, control) =
            (settings(&mut vm)?, path(&folder, "machine"), path(&folder, "control"));
        let options =
            ["--max-bandwidth", "1M", "--multifd-channels", "0", "--control", control.to_str().unwrap()];
        let ctl = |command: &[&str]| Program::start(multifd(["ctl"]).arg(&control).args(command)).done();
        let sends = |vm: &mut Vm| -> Result<(), Error> {
            let sends = |told: &Value| {
                told["status"] == "active" && told["ram"]["transferred"].as_u64() > Some(200_000)
            };
            while !sends(&vm.query_migrate()?) {
                sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        let program = capture(&options, &qmp, &file);
        sends(&mut vm)?;
        ctl(&["set", "max-bandwidth=3G", "downtime-limit=1999"]);
        let parameters = vm.execute("query-migrate-parameters", json!({}))?;
        assert_eq!(
            (&parameters["max-bandwidth"], &parameters["downtime-limit"]),
            (&json!(3_u64 << 30), &json!(1999))
        );
        program.done();
        assert_runs(&mut vm)?;
        assert_eq!(settings(&mut vm)?, before);
        assert_left(&folder, &["machine", "qmp"]);

        let program = capture(&[&options[..], &["--force"]].concat(), &qmp, &file);
        sends(&mut vm)?;
        ctl(&["cancel"]);
        program.end().assert_failed(130, &["migrate_cancel at the control socket"]);
        assert_runs(&mut vm)?;
        assert_eq!(settings(&mut vm)?, before);
        assert_left(&folder, &["machine", "qmp"]);
        Ok(())
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
                sleep(Duration::from_millis(20));
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
