//! A capture and a restore, step by step.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
    time::Duration,
};

use multifd_testkit::{
    guest::Guest,
    qemu::{PATIENCE, Qemu, Vm},
};
use qemu_stream::mapped_ram::MappedRamFile;
use serde_json::{Value, json};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_multifd");

/// More rounds than the guest needs to look at every page that it has filled.
pub(crate) const ROUNDS: u32 = 40;

/// What a migration is to be like.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) machine: &'static str,
    pub(crate) channels: u8,
    pub(crate) return_path: bool,
    /// Passes that the running guest is to take at least; 0 stops it before.
    pub(crate) passes: u64,
    pub(crate) uuid: Option<&'static str>,
    pub(crate) parameters: Value,
}

impl Way {
    pub(crate) fn new(machine: &'static str) -> Self {
        Self { machine, channels: 2, return_path: true, passes: 0, uuid: None, parameters: json!({}) }
    }
}

/// A running QEMU with the guest, as both sides must describe it.
pub(crate) fn start(qemu: &Qemu, way: &Way, guest: &Guest, incoming: bool) -> Vm {
    let mut vm = qemu.vm().machine(way.machine).guest(guest);
    if let Some(uuid) = way.uuid {
        vm = vm.uuid(uuid);
    }
    if incoming {
        vm = vm.incoming();
    }
    let mut vm = vm.start().unwrap();
    vm.set_multifd_channels(way.channels).unwrap();
    vm
}

/// `multifd receive`, listening.
pub(crate) struct Receive {
    child: Child,
    stderr: BufReader<ChildStderr>,
    pub(crate) address: String,
}

impl Receive {
    pub(crate) fn start(listen: &str, file: &Path, flags: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .arg("receive")
            .args(flags)
            .args(["--json", listen])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut first = String::new();
        stderr.read_line(&mut first).unwrap();
        let address = first.trim_end().strip_prefix("listening on ").expect(&first).to_owned();
        Self { child, stderr, address }
    }

    /// Its report, its words and its exit code.
    pub(crate) fn end(mut self) -> (Value, String, Option<i32>) {
        let (mut out, mut talk) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.stderr.read_to_string(&mut talk).unwrap();
        let code = self.child.wait().unwrap().code();
        (serde_json::from_str(&out).unwrap_or(Value::Null), talk, code)
    }
}

impl Drop for Receive {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the guest run, stops it if it is to be stopped, and migrates it to `address` in as many passes as asked.
pub(crate) fn migrate(source: &mut Vm, way: &Way, address: &str) {
    source.set_capabilities(&[("return-path", way.return_path)]).unwrap();
    source.wait_round(3, PATIENCE).unwrap();
    if way.passes == 0 {
        source.stop().unwrap();
    }
    let slow = json!({ "max-bandwidth": 60_000_000, "downtime-limit": 50 });
    let fast = json!({ "max-bandwidth": 0, "downtime-limit": 2000 });
    source.set_parameters(if way.passes > 2 { slow } else { fast.clone() }).unwrap();
    source.set_parameters(way.parameters.clone()).unwrap();
    source.migrate(address).unwrap();
    if way.passes > 2 {
        source.wait_passes(way.passes, PATIENCE).unwrap();
        source.set_parameters(fast).unwrap();
    }
    source.wait_migration("completed", PATIENCE).unwrap();
}

/// Migrates the guest of `source` into `file`.
pub(crate) fn capture(source: &mut Vm, way: &Way, listen: &str, file: &Path, flags: &[&str]) -> Value {
    let receive = Receive::start(listen, file, flags);
    migrate(source, way, &receive.address);
    let (report, talk, code) = receive.end();
    assert_eq!((code, report["status"].as_str()), (Some(0), Some("completed")), "{way:?}: {talk}");
    assert_eq!(report["channels"].as_array().map(Vec::len), Some(way.channels.into()), "{report}");
    let bytes: u64 =
        report["channels"].as_array().into_iter().flatten().filter_map(|c| c["bytes"].as_u64()).sum();
    assert_eq!(report["ram"]["multifd-bytes"].as_u64(), Some(bytes));
    report
}

/// Sends `file` to `address`.
pub(crate) fn send(way: &Way, file: &Path, address: &str, flags: &[&str]) -> Output {
    Command::new(PROGRAM)
        .args(["send", "--json", "--multifd-channels", &way.channels.to_string()])
        .args(flags)
        .arg(file)
        .arg(address)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Sends `file` into a waiting QEMU, and sees the guest run on.
pub(crate) fn restore(qemu: &Qemu, way: &Way, guest: &Guest, file: &Path, listen: &str) {
    let mut destination = start(qemu, way, guest, true);
    let address = destination.migrate_incoming(listen).unwrap();
    let sent = send(way, file, &address, &[]);
    let talk = String::from_utf8_lossy(&sent.stderr);
    assert_eq!(sent.status.code(), Some(0), "{way:?}: {talk}\n{}", destination.stderr());
    let report: Value = serde_json::from_slice(&sent.stdout).unwrap();
    assert_eq!(report["status"], "completed", "{report}");
    runs_on(&mut destination);
}

/// The guest goes on where it was, and finds every page as it left it.
pub(crate) fn runs_on(vm: &mut Vm) {
    vm.wait_migration("completed", PATIENCE).unwrap();
    if vm.run_state().unwrap() != "running" {
        vm.cont().unwrap();
    }
    let at = vm.wait_round(0, PATIENCE).unwrap();
    vm.wait_round(at + ROUNDS, PATIENCE).unwrap();
}

/// Compares what a stopped source has in its RAM with what is in the file, page by page.
pub(crate) fn assert_stored(source: &mut Vm, file: &Path) {
    let file = MappedRamFile::open(fs::File::open(file).unwrap(), 0).unwrap();
    let blocks: Vec<_> = file.blocks().iter().map(|(index, entry)| (index, entry.name.to_string())).collect();
    let (index, _) = blocks.iter().find(|(_, name)| name == "pc.ram").unwrap();
    let (place, bitmap) = (*file.place(*index).unwrap(), file.bitmap(*index).unwrap());
    let ram = source.pmemsave(0, place.used_length).unwrap();
    let mut present = 0;
    for (page, theirs) in ram.chunks(4096).enumerate() {
        // There the machine shows other memory than its RAM.
        if (0xa0..0x100).contains(&page) {
            continue;
        }
        let mut ours = [0; 4096];
        if bitmap[page / 64] >> (page % 64) & 1 == 1 {
            file.file().read_exact_at(&mut ours, place.pages_offset + page as u64 * 4096).unwrap();
            present += 1;
        }
        assert!(ours == theirs, "page {page:#x} differs");
    }
    assert!(present > 1000, "{present} pages are too few to prove anything");
}

/// A folder for one test's file.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The names of what is in it.
    pub(crate) fn contents(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }
}

/// How long a refusal may take.
pub(crate) const SOON: Duration = Duration::from_secs(20);
