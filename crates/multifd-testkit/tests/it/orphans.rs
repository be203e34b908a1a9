//! A killed test run leaves no process behind. The run is this test binary, started again with one task.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    thread,
};

use multifd_testkit::{
    child,
    qemu::{PATIENCE, Qemu},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Starts a run that starts a process, and returns the run and a descriptor of that process.
fn run(what: &str) -> (Child, OwnedFd) {
    let mut run = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "orphans::run_that_is_killed", "--include-ignored", "--nocapture"])
        .env(WHAT, what)
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(run.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let pid = lines.find_map(|line| line.strip_prefix(STARTED)?.parse().ok()).and_then(Pid::from_raw);
    (run, pidfd_open(pid.expect("a process id"), PidfdFlags::empty()).expect("it is there"))
}

/// Whether the process ends in time.
fn ends(process: &OwnedFd) -> bool {
    let patience = Timespec::try_from(PATIENCE).expect("a time");
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&patience)).expect("waited for") == 1
}

fn killed(what: &str) {
    let (mut run, process) = run(what);
    run.kill().expect("killed");
    run.wait().expect("waited for");
    assert!(ends(&process), "{what} outlives the run that started it");
}

#[test]
fn process_ends_with_the_run_that_is_killed() {
    killed("shell");
}

#[test]
fn qemu_ends_with_the_run_that_is_killed() {
    if Qemu::v10_0().is_some() {
        killed("qemu");
    }
}

/// The process of the run, not a separate test: the tests above start it.
#[test]
#[ignore = "the other process of a test"]
fn run_that_is_killed() {
    let started = |id: u32| println!("\n{STARTED}{id}");
    match std::env::var(WHAT).as_deref() {
        Ok("shell") => {
            let start = || {
                let mut shell = Command::new("sh");
                shell.args(["-c", "read line; echo $line; exec sleep 600"]);
                child::spawn(shell.stdin(Stdio::piped()).stdout(Stdio::piped())).expect("started")
            };
            let mut shell = thread::spawn(start).join().expect("no panic");
            // It has outlived the thread that started it, and would outlive everything.
            shell.stdin.take().expect("piped").write_all(b"there\n").expect("taken");
            let mut line = String::new();
            BufReader::new(shell.stdout.take().expect("piped")).read_line(&mut line).expect("given back");
            assert_eq!(line, "there\n");
            started(shell.id());
            let _ = shell.wait();
        }
        Ok("qemu") => {
            let start = || Qemu::v10_0().expect("a QEMU").vm().start().expect("started");
            let mut vm = thread::spawn(start).join().expect("no panic");
            // The QEMU has outlived it, too, as its monitor proves.
            vm.run_state().expect("told");
            started(vm.pid());
            thread::park();
        }
        _ => {}
    }
}

const WHAT: &str = "MULTIFD_TEST_ORPHAN";
const STARTED: &str = "started process ";
