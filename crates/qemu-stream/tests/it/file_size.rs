//! A monitor whose limit of file size is below the size of its machine, and which has not changed `SIGXFSZ`: the limit
//! is reported, and the monitor survives. The process is this test binary, started again.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use multifd::{
    SendOptions, Sender,
    channel::Stop,
    error::chain,
    live::{DeviceName, DeviceSection, Main, MigrateOptions, Migration, MigrationInfo, RunState, Verdict},
    ram::NeverDirty,
};
use multifd_testkit::lacks;
use qemu_stream::{
    error::Usage,
    mapped_ram::{Capture, CaptureOptions, MappedRamFile},
};

use crate::snapshots::{Stopped, configuration, filled};

/// Regression: a capture ended the monitor, because the library kept the signal's default action.
#[test]
fn file_that_may_not_grow_fails_the_capture_and_the_monitor_lives() {
    let program = std::env::current_exe().expect("this program");
    let mut process = Command::new("prlimit");
    process.arg("--fsize=67108864").arg(program).args(["--exact", PROCESS, "--include-ignored"]);
    match process.env(TOLD, "1").output() {
        Ok(ended) => assert!(ended.status.success(), "{ended:?}"),
        Err(_) => lacks("no program prlimit"),
    }
}

fn limit(bytes: u64) {
    let own = std::process::id().to_string();
    let set = Command::new("prlimit").args(["--pid", &own, &format!("--fsize={bytes}:67108864")]).status();
    assert!(set.expect("started").success());
}

fn begin(path: &Path) -> multifd::Result<Capture> {
    let file =
        File::options().read(true).write(true).create(true).truncate(false).open(path).expect("a file");
    Capture::of_guest(file, configuration(), &filled(), &CaptureOptions::new())
}

/// Runs the capture over this number of channels; 0 means over main.
fn run(mut capture: Capture, channels: u8) -> multifd::Result<MigrationInfo> {
    let (blocks, stop) = (filled(), Stop::new());
    let sender = (channels > 0).then(|| {
        let options = SendOptions::new().channels(channels);
        let mut sender = Sender::new(options, blocks.clone(), stop.clone()).expect("a sender");
        sender.set_up_into(capture.blocks().clone()).expect("set up");
        sender
    });
    let migration = match sender {
        Some(sender) => Migration::new(MigrateOptions::new(), sender),
        None => Migration::over_main(MigrateOptions::new(), blocks, stop),
    };
    migration?.run(&mut capture, &mut NeverDirty, &mut Stopped::default())
}

/// Not a separate test: the one above starts it.
#[test]
#[ignore = "the other process of a test"]
fn process_with_a_limit() {
    if std::env::var_os(TOLD).is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("machine");

    // Detected beforehand: the file is not changed.
    fs::write(&path, "an older machine").expect("written");
    limit(8 << 20);
    let refused = begin(&path).expect_err("refused");
    let multifd::Error::Other { source, .. } = &refused else { panic!("{refused:?}") };
    let mistake = source.downcast_ref::<Usage>();
    assert!(matches!(mistake, Some(Usage::FileSize { limit: 0x80_0000, .. })), "{refused:?}");
    assert!(
        chain(&refused)
            .to_string()
            .contains("may only write files of 0x800000 bytes (RLIMIT_FSIZE, `ulimit -f`)")
    );
    assert_eq!(fs::read(&path).expect("read"), b"an older machine");

    // Pages, over channels and over main.
    for channels in [0, 1, 4] {
        limit(64 << 20);
        let capture = begin(&path).expect("laid out");
        limit(2 << 20);
        let failed = run(capture, channels).expect_err("no room");
        assert!(chain(&failed).to_string().contains("File too large"), "{failed:?}");
    }

    // Devices, which come after everything else.
    limit(64 << 20);
    let mut capture = begin(&path).expect("laid out");
    let end = fs::metadata(&path).expect("there").len();
    limit(end + 100);
    let data = vec![7; 1 << 20];
    let device = DeviceSection { name: DeviceName::from_static("vcpu"), instance_id: 0, version: 1, data };
    capture.devices(vec![device], RunState::Running).expect("kept");
    let Verdict::Refused(failed) = capture.complete(&Stop::new()) else { panic!("there is no room") };
    assert!(chain(&failed).to_string().contains("File too large"), "{failed:?}");
    MappedRamFile::open(File::open(&path).expect("there"), 0).expect_err("nothing in it counts");
}

const PROCESS: &str = "file_size::process_with_a_limit";
const TOLD: &str = "MULTIFD_TEST_FILE_SIZE";
