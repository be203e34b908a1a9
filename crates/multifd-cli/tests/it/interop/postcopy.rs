//! `multifd send --postcopy-ram`: the guest of a stock QEMU runs out of a file before its RAM is there.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use multifd::ram::BlockIndex;
use multifd_testkit::{
    certificates::write_both,
    guest::Guest,
    lacks,
    qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder},
    slow_file::SlowFile,
};
use qemu_stream::mapped_ram::MappedRamFile;
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::kit::{ALL_CHECKED, Program, feed, folder, machine, migrate_live, multifd, path, run, source};

/// A guest that was captured while it ran, and its file.
pub(super) fn captured(qemu: &Qemu) -> Result<(TempDir, PathBuf, Vm), Error> {
    captured_of(machine(qemu, &qemu.machine()))
}

fn captured_of(builder: VmBuilder) -> Result<(TempDir, PathBuf, Vm), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(builder)?;
    from.set_multifd_channels(2)?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    migrate_live(&mut from, &address, 3)?;
    receive.done();
    Ok((folder, file, from))
}

/// A QEMU that waits for post-copy, and its address.
pub(super) fn waiting(qemu: &Qemu, preempt: bool) -> Result<(Vm, String), Error> {
    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    to.set_capabilities(&[("postcopy-ram", true)])?;
    if preempt {
        to.set_capabilities(&[("postcopy-preempt", true)])?;
    }
    let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
    Ok((to, address))
}

fn options(preempt: bool) -> &'static [&'static str] {
    if preempt { &["--postcopy-ram", "--postcopy-preempt"] } else { &["--postcopy-ram"] }
}

/// The guest continues, and finds all of its memory right.
pub(super) fn assert_checks_all(vm: &mut Vm) -> Result<(), Error> {
    // It has reported nothing before it runs.
    let at = vm.wait_round(1, PATIENCE)?;
    vm.wait_round(at + ALL_CHECKED, PATIENCE)?;
    assert_eq!(vm.run_state()?, "running");
    Ok(())
}

pub(super) fn with_all(test: impl Fn(&Qemu, bool) -> Result<(), Error>) {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        for preempt in [false, true] {
            test(&qemu, preempt)
                .unwrap_or_else(|error| panic!("QEMU {}, preempt {preempt}: {error}", qemu.series()));
        }
    }
}

#[test]
fn guest_runs_out_of_a_file_while_its_pages_come() {
    with_all(|qemu, preempt| {
        let (_folder, file, from) = captured(qemu)?;
        drop(from);
        let (mut to, address) = waiting(qemu, preempt)?;
        let mut options = options(preempt).to_vec();
        // So slow that the walk takes seconds.
        options.extend(["--json", "--max-postcopy-bandwidth", "20M"]);
        let sent = feed(&options, &file, &address);
        let report = sent.done().json();
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)?;
        println!("QEMU {}, preempt {preempt}: {report}", qemu.series());
        assert_eq!(report["status"], "completed");
        assert!(report["ram"]["postcopy-requests"].as_u64() > Some(0), "{report}");
        assert!(
            report["postcopy"]["guest-running-after"].as_u64() < report["total-time"].as_u64(),
            "{report}"
        );
        Ok(())
    });
}

/// Waits until the destination has noticed the broken connection, and lets it listen again. Returns the address.
pub(super) fn recovering(to: &mut Vm) -> Result<String, Error> {
    to.wait_migration("postcopy-paused", PATIENCE)?;
    to.execute("migrate-recover", json!({ "uri": "tcp:127.0.0.1:0" }))?;
    let told = to.query_migrate()?;
    let port = told["socket-address"][0]["port"].as_str().unwrap_or_else(|| panic!("{told}"));
    Ok(format!("tcp:127.0.0.1:{port}"))
}

/// The process of the source is killed again and again. Each time another one continues, which knows only the file.
#[test]
fn guest_survives_the_end_of_its_source_and_another_process_continues() {
    with_all(|qemu, preempt| {
        let (_folder, file, from) = captured(qemu)?;
        drop(from);
        let (mut to, address) = waiting(qemu, preempt)?;
        let mut options = options(preempt).to_vec();
        options.extend(["--json", "--max-postcopy-bandwidth", "1M"]);
        let mut sent = feed(&options, &file, &address);
        options[0] = "--resume";
        for kill in 0..3 {
            to.wait_run_state("running", PATIENCE)?;
            sleep(Duration::from_millis(30 + 20 * kill));
            sent.signal(Signal::KILL);
            assert_eq!(sent.end().code, None);
            let address = recovering(&mut to)?;
            sent = feed(&options, &file, &address);
        }
        let report = sent.done().json();
        println!("{report}");
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)
    });
}

/// Both connections are encrypted, also those of a process that continues.
#[test]
fn guest_runs_out_of_a_file_over_tls() {
    with_all(|qemu, preempt| {
        let (_folder, file, from) = captured(qemu)?;
        drop(from);
        let theirs = folder();
        write_both(theirs.path()).unwrap();
        let certificates = theirs.path().to_str().unwrap();
        let credentials = format!("tls-creds-x509,id=tls,dir={certificates},endpoint=server");
        let vm = machine(qemu, &qemu.machine()).args(["-object".to_owned(), credentials]);
        let mut to = vm.incoming().start()?;
        to.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)])?;
        to.set_parameters(json!({ "tls-creds": "tls" }))?;
        let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
        let mut options = options(preempt).to_vec();
        options.extend(["--json", "--tls-creds", certificates, "--tls-hostname", "localhost"]);
        // So slow that most of it is missing when it is killed, also under load.
        let slow = [&options[..], &["--max-postcopy-bandwidth", "500K"]].concat();
        let sent = feed(&slow, &file, &address);
        to.wait_run_state("running", PATIENCE)?;
        sleep(Duration::from_millis(200));
        sent.signal(Signal::KILL);
        assert_eq!(sent.end().code, None);
        options[0] = "--resume";
        let address = recovering(&mut to)?;
        let report = feed(&options, &file, &address).done().json();
        assert!(report["ram"]["normal"].as_u64() > Some(0), "{report}");
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)
    });
}

/// Each read of the file takes 10 ms. Requests do not wait behind the reads of other pages.
#[test]
fn guest_runs_out_of_a_slow_file() {
    with_all(|qemu, preempt| {
        let (_folder, file, from) = captured(qemu)?;
        drop(from);
        let delay = Duration::from_millis(10);
        let Some(slow) = SlowFile::of(&file, delay).expect("the file") else { return Ok(()) };
        let (mut to, address) = waiting(qemu, preempt)?;
        let mut options = options(preempt).to_vec();
        options.push("--json");
        let report = feed(&options, &slow.path(), &address).done().json();
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)?;
        println!("{report}, {} reads, {} at once", slow.reads(), slow.most_at_once());
        let requests = report["ram"]["postcopy-requests"].as_u64();
        assert!(requests > Some(0), "{report}");
        assert!(slow.most_at_once() >= 4, "{}", slow.most_at_once());
        Ok(())
    });
}

/// A QEMU that `restore` controls.
fn controlled(qemu: &Qemu, qmp: &Path) -> Result<Vm, Error> {
    let socket = format!("unix:{},server=on,wait=off", qmp.display());
    machine(qemu, &qemu.machine()).args(["-qmp".to_owned(), socket]).incoming().start()
}

fn restore(options: &[&str], file: &Path, qmp: &Path) -> Program {
    Program::start(multifd(["restore"]).args(options).arg(file).arg(qmp))
}

fn with_both(test: impl Fn(&Qemu) -> Result<(), Error>) {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        test(&qemu).unwrap_or_else(|error| panic!("QEMU {}: {error}", qemu.series()));
    }
}

/// The first start records what the guest needs, so the second one sends that first.
#[test]
fn second_start_makes_a_fifth_of_the_requests() {
    with_both(|qemu| {
        // It uses the first pages only.
        let guest = Guest::new().working_set(512).filled_checked(0);
        let (folder, file, from) = captured_of(machine(qemu, &qemu.machine()).guest(&guest))?;
        drop(from);
        let mut requests = Vec::new();
        for start in 0..2 {
            let qmp = path(&folder, &format!("qmp{start}"));
            let mut to = controlled(qemu, &qmp)?;
            let control = path(&folder, &format!("control{start}"));
            let control = control.to_str().unwrap();
            let options =
                ["--postcopy-ram", "--json", "--max-postcopy-bandwidth", "16K", "--control", control];
            let restored = restore(&options, &file, &qmp);
            // The guest asks for what it uses: a page in four seconds comes without a request.
            to.wait_run_state("running", PATIENCE)?;
            assert_checks_all(&mut to)?;
            let useless = run(["ctl", control, "set", "max-bandwidth=0"]);
            useless.assert_failed(1, &["max-bandwidth has no effect", "only max-postcopy-bandwidth"]);
            let raised = run(["ctl", control, "set", "max-postcopy-bandwidth=0"]);
            assert_eq!(raised.code, Some(0), "{raised:?}");
            let report = restored.done().json();
            println!("{report}");
            requests.push(report["ram"]["postcopy-requests"].as_u64().expect("a number"));
            to.wait_migration("completed", PATIENCE)?;
            assert_checks_all(&mut to)?;
            // Everything is as before for the next migration.
            let capabilities = to.execute("query-migrate-capabilities", json!({}))?;
            let on = capabilities.as_array().unwrap().iter().filter(|one| one["state"] == true).count();
            assert_eq!(on, 0, "{capabilities}");
        }
        assert!(requests[0] > 250 && requests[1] * 5 <= requests[0], "{requests:?}");
        Ok(())
    });
}

#[test]
fn broken_connections_are_replaced_until_the_guest_has_all_of_its_memory() {
    with_both(|qemu| {
        let (folder, file, from) = captured(qemu)?;
        drop(from);
        let qmp = path(&folder, "qmp");
        let mut to = controlled(qemu, &qmp)?;
        let options = ["--postcopy-ram", "--retry", "--json", "--max-postcopy-bandwidth", "1M"];
        let restored = restore(&options, &file, &qmp);
        for pause in 0..3 {
            to.wait_run_state("running", PATIENCE)?;
            to.wait_migration("postcopy-active", PATIENCE)?;
            sleep(Duration::from_millis(30 + 20 * pause));
            to.execute("yank", json!({ "instances": [{ "type": "migration" }] }))?;
            // The status changes later, and lasts for as long as the program waits before it tries again.
            to.wait_migration("postcopy-paused", PATIENCE)?;
        }
        let report = restored.done().json();
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)?;
        assert!(report["postcopy"]["recoveries"].as_u64() >= Some(3), "{report}");
        Ok(())
    });
}

/// A damaged page is never sent: everything else is, and the guest waits for it. A repaired file completes it.
#[test]
fn guest_never_gets_a_damaged_page() {
    with_all(|qemu, preempt| {
        let (_folder, file, from) = captured(qemu)?;
        drop(from);
        let machine = MappedRamFile::open_damaged(fs::File::open(&file).unwrap(), 0).unwrap();
        let present = machine.bitmap(BlockIndex(0)).unwrap();
        let (page, count) = present.set_runs().last().expect("a page");
        let page = multifd::ram::PageIndex(page.0 + count - 1);
        let at = machine.place(BlockIndex(0)).unwrap().page_offset(page).unwrap();
        let bytes = fs::File::options().read(true).write(true).open(&file).unwrap();
        let mut byte = [0];
        bytes.read_exact_at(&mut byte, at + 9).unwrap();
        bytes.write_all_at(&[byte[0] ^ 1], at + 9).unwrap();

        let (mut to, address) = waiting(qemu, preempt)?;
        let mut options = options(preempt).to_vec();
        let ended = feed(&options, &file, &address).end();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for text in ["was interrupted", "the guest belongs to the destination", "differs from its digest"] {
            assert!(ended.stderr.contains(text), "{text}: {ended:?}");
        }
        let address = recovering(&mut to)?;
        bytes.write_all_at(&byte, at + 9).unwrap();
        options[0] = "--resume";
        feed(&options, &file, &address).done();
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)
    });
}

/// Nothing is lost where the guest has not started: the file can be sent again.
#[test]
fn destination_without_post_copy_refuses_and_the_guest_stays_in_the_file() {
    with_both(|qemu| {
        let (_folder, file, from) = captured(qemu)?;
        drop(from);
        let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
        let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
        let ended = feed(&["--postcopy-ram"], &file, &address).end();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("the guest was not started at the destination"), "{ended:?}");
        let (mut to, address) = waiting(qemu, false)?;
        feed(&["--postcopy-ram"], &file, &address).done();
        to.wait_migration("completed", PATIENCE)?;
        assert_checks_all(&mut to)
    });
}

/// Huge pages of the system, for as long as this lives.
struct HugePages(String);

impl HugePages {
    const PLACE: &str = "/proc/sys/vm/nr_hugepages";

    /// Reserves this number of them; `None` if the system does not.
    fn reserve(count: u32) -> Option<Self> {
        let before = fs::read_to_string(Self::PLACE).ok()?;
        let wanted = before.trim().parse::<u32>().ok()? + count;
        fs::write(Self::PLACE, wanted.to_string()).ok()?;
        let reserved = Self(before);
        let found = fs::read_to_string(Self::PLACE).ok()?;
        (found.trim() == wanted.to_string()).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::PLACE, self.0.trim());
    }
}

/// The destination places whole pages of 2 MiB. Their size is not in the file, so it is named; without the name the
/// destination refuses before the guest starts.
#[test]
fn guest_in_huge_pages_runs_out_of_a_file() {
    let Some(_reserved) = HugePages::reserve(2 * MEMORY_IN_HUGE_PAGES) else {
        lacks("huge pages that this process may reserve");
        return;
    };
    with_all(|qemu, preempt| {
        let vm = || {
            let memory = format!(
                "memory-backend-memfd,id=m0,size={}M,hugetlb=on,hugetlbsize=2M",
                2 * MEMORY_IN_HUGE_PAGES
            );
            let machine = machine(qemu, &format!("{},memory-backend=m0", qemu.machine()));
            machine.args(["-object".to_owned(), memory])
        };
        let (_folder, file, from) = captured_of(vm())?;
        drop(from);
        for named in [false, true] {
            let mut to = vm().incoming().start()?;
            to.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)])?;
            let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
            let mut options = options(preempt).to_vec();
            options.extend(["--json", "--max-postcopy-bandwidth", "20M"]);
            if !named {
                let ended = feed(&options, &file, &address).end();
                assert_eq!(ended.code, Some(1), "{ended:?}");
                assert!(ended.stderr.contains("the guest was not started at the destination"), "{ended:?}");
                continue;
            }
            options.extend(["--host-page-size", "m0=2M"]);
            let report = feed(&options, &file, &address).done().json();
            assert!(report["ram"]["postcopy-requests"].as_u64() > Some(0), "{report}");
            to.wait_migration("completed", PATIENCE)?;
            assert_checks_all(&mut to)?;
        }
        Ok(())
    });
}

/// Pages of 2 MiB of the guest's RAM.
const MEMORY_IN_HUGE_PAGES: u32 = 20;
