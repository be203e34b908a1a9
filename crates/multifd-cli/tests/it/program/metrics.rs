//! `--metrics`: the numbers of a run for a collector, while it runs and at its end.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use multifd_testkit::qemu::PATIENCE;
use rustix::process::Signal;

use crate::{
    kit::{PAGE, Program, assert_left, captured, feed, folder, path, run},
    metrics::{Page, read_metrics},
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const MIB: u64 = 1 << 20;

fn status(page: &Page, status: &str) -> Option<f64> {
    assert_eq!(page.all("status", &[]).iter().sum::<f64>(), 1.0, "one status at a time: {page:?}");
    page.one("status", &[("status", status)])
}

/// The first page of the file with this property.
fn page_with(path: &Path, has: impl Fn(&Page) -> bool) -> Page {
    let begun = Instant::now();
    loop {
        let page = path.exists().then(|| read_metrics(path));
        match page {
            Some(page) if has(&page) => return page,
            page => assert!(begun.elapsed() < PATIENCE, "{page:?}"),
        }
        sleep(Duration::from_millis(50));
    }
}

#[test]
fn both_ends_write_true_numbers_while_they_run_and_at_their_end() {
    let folder = folder();
    let from = captured(&folder, 16 * MIB);
    let (sending, receiving) = (path(&folder, "sending.prom"), path(&folder, "receiving.prom"));
    let file = path(&folder, "machine \"with\" \\ all");
    let begun = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let (receive, address) = Program::receive(&["--metrics", receiving.to_str().unwrap()], LOCAL, &file);
    let page = read_metrics(&receiving);
    assert_eq!((status(&page, "none"), page.one("exit_code", &[])), (Some(1.0), None), "{page:?}");
    let options = ["--max-bandwidth", "2M", "--metrics", sending.to_str().unwrap()];
    let send = feed(&options, &from, &address);
    for path in [&sending, &receiving] {
        let page = page_with(path, |page| status(page, "active") == Some(1.0));
        let bytes = page.one("transferred_bytes", &[]).unwrap();
        assert!(bytes > MIB as f64 && bytes < 16.0 * MIB as f64, "{page:?}");
        assert_eq!((page.one("end_time_seconds", &[]), page.one("exit_code", &[])), (None, None), "{page:?}");
    }
    send.done();
    receive.done();
    for (path, verb, named) in [(&sending, "send", &from), (&receiving, "receive", &file)] {
        let page = read_metrics(path);
        assert_eq!(status(&page, "completed"), Some(1.0), "{page:?}");
        let labels = [("verb", verb), ("file", named.to_str().unwrap())];
        let one = |name: &str| page.one(name, &labels).unwrap_or_else(|| panic!("{name}: {page:?}"));
        assert_eq!((one("exit_code"), one("ram_bytes")), (0.0, 16.0 * MIB as f64));
        let pages = page.one("pages", &[("kind", "normal")]).unwrap();
        assert_eq!(pages, (16 * MIB) as f64 / PAGE as f64, "{page:?}");
        let channels = page.all("channel_bytes", &[]);
        assert_eq!(channels.len(), 2);
        assert_eq!(channels.iter().sum::<f64>() + one("main_bytes"), one("transferred_bytes"));
        assert!(one("start_time_seconds") >= begun - 1.0 && one("duration_seconds") > 4.0, "{page:?}");
        assert!(one("end_time_seconds") > one("start_time_seconds") + 4.0, "{page:?}");
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o644);
    }
    fs::remove_file(&file).unwrap();
    assert_left(&folder, &["captured", "receiving.prom", "sending.prom"]);
}

/// Also one that ends before there is a migration.
#[test]
fn failure_of_a_run_is_in_its_metrics() {
    let folder = folder();
    let (from, numbers) = (captured(&folder, MIB), path(&folder, "numbers.prom"));
    let metrics = ["--metrics", numbers.to_str().unwrap()];
    let at = |name: &str| path(&folder, name).to_str().unwrap().to_owned();
    let receive = [&["receive"][..], &metrics, &[LOCAL, from.to_str().unwrap()]].concat();
    run(receive).assert_failed(1, &["it exists"]);
    let page = read_metrics(&numbers);
    assert_eq!((status(&page, "failed"), page.one("exit_code", &[])), (Some(1.0), Some(1.0)), "{page:?}");

    let gone = format!("unix:{}", at("gone"));
    let send = [&["send"][..], &metrics, &[from.to_str().unwrap(), &gone]].concat();
    assert_eq!(run(send).code, Some(1));
    let page = read_metrics(&numbers);
    assert_eq!(status(&page, "failed"), Some(1.0));
    assert_eq!(page.one("run_info", &[("address", &gone)]), Some(1.0), "{page:?}");
    for (verb, arguments) in [("capture", [gone.as_str(), &at("new")]), ("restore", [&at("captured"), &gone])]
    {
        assert_eq!(run([&[verb][..], &metrics, &arguments].concat()).code, Some(1));
        assert_eq!(read_metrics(&numbers).one("exit_code", &[("verb", verb)]), Some(1.0));
    }

    let (receive, _) = Program::receive(&metrics, LOCAL, &path(&folder, "machine"));
    receive.signal(Signal::INT);
    receive.end().assert_failed(130, &[]);
    let page = read_metrics(&numbers);
    assert_eq!(
        (status(&page, "cancelled"), page.one("exit_code", &[])),
        (Some(1.0), Some(130.0)),
        "{page:?}"
    );
}

#[test]
fn metrics_that_cannot_be_written_are_an_error_at_the_start_and_a_warning_later() {
    let folder = folder();
    for wrong in ["no/such/folder/x.prom", folder.path().to_str().unwrap(), "/dev/null"] {
        let ended = run(["receive", "--metrics", wrong, LOCAL, path(&folder, "machine").to_str().unwrap()]);
        ended.assert_failed(1, &["cannot write the metrics to ", wrong, "because: "]);
    }
    assert_left(&folder, &[]);
    let from = captured(&folder, MIB);
    let place = path(&folder, "place");
    fs::create_dir(&place).unwrap();
    let numbers = place.join("x.prom");
    let (receive, address) =
        Program::receive(&["--metrics", numbers.to_str().unwrap()], LOCAL, &path(&folder, "machine"));
    fs::remove_dir_all(&place).unwrap();
    feed(&[], &from, &address).done();
    let ended = receive.done();
    assert!(ended.stderr.contains("cannot write the metrics to "), "{ended:?}");
}
