//! The program as a child process, and machines as its peers.
//!
//! Every wait has a limit, and every process is killed when its handle is dropped: a test that fails leaves nothing
//! running, and neither does a run that is killed.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use multifd::ram::{BlockName, PageIndex, PageSize};
use multifd_testkit::{
    child,
    guest::Guest,
    qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder},
};
use qemu_stream::{
    format::{BlockEntry, BlockList, Configuration, Device, DevicePart, MachineType, SectionId, SectionName},
    mapped_ram::{Layout, MappedRamFile, Tail},
};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The program, running.
pub(crate) struct Program {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    lines: Receiver<String>,
    peak: u64,
}

/// The program, ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code; `None` if a signal has killed it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// The most memory that it had resident, in KiB, as seen every few milliseconds.
    pub(crate) peak: u64,
}

/// The program with these arguments, to be started.
pub(crate) fn multifd<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_multifd"));
    command.args(arguments).env_remove("MULTIFD_LOG").stdin(Stdio::null());
    command
}

/// The program with these arguments, started after `script` has changed its environment: the limits of a shell, the
/// mounts of a namespace.
pub(crate) fn multifd_in(launcher: &[&str], script: &str, arguments: &[&str]) -> Command {
    let shell = ["sh", "-c", &format!("{script} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_multifd")];
    let words: Vec<&str> = launcher.iter().copied().chain(shell).chain(arguments.iter().copied()).collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env_remove("MULTIFD_LOG").stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub(crate) fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ended {
    Program::start(&mut multifd(arguments)).end()
}

/// `multifd send` of a file.
pub(crate) fn feed(options: &[&str], file: &Path, address: &str) -> Program {
    Program::start(multifd(["send"]).args(options).arg(file).arg(address))
}

impl Program {
    /// Starts it, and collects its output. The command's contents are moved out.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::start_with_output(command, Stdio::piped())
    }

    /// Starts it with a different standard output.
    pub(crate) fn start_with_output(command: &mut Command, output: impl Into<Stdio>) -> Self {
        command.stdout(output).stderr(Stdio::piped());
        let mut child = child::spawn(command).expect("the program");
        let (line, lines) = channel();
        let mut out = child.stdout.take();
        let mut err = BufReader::new(child.stderr.take().expect("piped"));
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(out) = &mut out {
                out.read_to_string(&mut text).expect("standard output is text");
            }
            text
        });
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            let mut start = 0;
            while err.read_line(&mut text).expect("standard error is text") > 0 {
                // The receiver may have been dropped.
                let _ = line.send(text[start..].trim_end_matches('\n').to_owned());
                start = text.len();
            }
            text
        });
        Self { child, stdout: Some(stdout), stderr: Some(stderr), lines, peak: 0 }
    }

    /// `multifd receive OPTIONS LISTEN FILE`, and its address.
    pub(crate) fn receive(options: &[&str], listen: &str, file: &Path) -> (Self, String) {
        let mut command = multifd(["receive"]);
        let program = Self::start(command.args(options).arg(listen).arg(file));
        let address = program.listening();
        (program, address)
    }

    /// The address in the first line of standard error.
    pub(crate) fn listening(&self) -> String {
        let line = self.next_line();
        let address = line.strip_prefix("listening on ");
        address.unwrap_or_else(|| panic!("expected the address it listens at, found {line:?}")).to_owned()
    }

    /// The next line of standard error, except that `send` reports a file without UUID.
    pub(crate) fn next_line(&self) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).expect("a line on standard error");
            if !line.contains("has no UUID") {
                return line;
            }
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("the program is there");
    }

    /// Limits the size of its files to `bytes`.
    pub(crate) fn limit_file_size(&self, bytes: u64) {
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        rustix::process::prlimit(Some(self.pid()), Resource::Fsize, limit).expect("limit the program");
    }

    /// Waits until it ends by itself.
    pub(crate) fn end(self) -> Ended {
        self.end_within(PATIENCE)
    }

    /// The same, in this time.
    pub(crate) fn end_within(mut self, patience: Duration) -> Ended {
        let start = Instant::now();
        loop {
            self.peak = self.peak.max(self.resident().unwrap_or_default());
            if let Some(status) = self.child.try_wait().expect("wait for the program") {
                return self.ended(status);
            }
            if start.elapsed() >= patience {
                // Its output is complete only after its end.
                self.child.kill().expect("kill the program");
                let status = self.child.wait().expect("wait for the program");
                panic!("the program did not end within {patience:?}: {:?}", self.ended(status));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until it has had `least` KiB resident, or has ended.
    ///
    /// A program that is about to end may be gone before it is looked at, so a test does this before it sends the last
    /// bytes.
    pub(crate) fn await_resident(&mut self, least: u64) {
        let start = Instant::now();
        while let Some(resident) = self.resident() {
            self.peak = self.peak.max(resident);
            if resident >= least {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{resident} KiB resident, expected {least}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The most memory that it had resident until now, in KiB; `None` if it has ended.
    fn resident(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    }

    /// Waits for success.
    pub(crate) fn done(self) -> Ended {
        let ended = self.end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended
    }

    fn ended(&mut self, status: ExitStatus) -> Ended {
        let text = |thread: &mut Option<JoinHandle<String>>| {
            thread.take().expect("taken once").join().expect("the output is text")
        };
        Ended {
            code: status.code(),
            stdout: text(&mut self.stdout),
            stderr: text(&mut self.stderr),
            peak: self.peak,
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // In most cases it has ended already; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The one line of standard output, as JSON.
    pub(crate) fn json(&self) -> Value {
        assert!(self.stdout.ends_with('\n') && self.stdout.lines().count() == 1, "one line: {self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Asserts that it failed, and that standard error contains all of these texts.
    #[track_caller]
    pub(crate) fn assert_failed(&self, code: i32, told: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        for words in told {
            assert!(self.stderr.contains(words), "expected {words:?}: {self:?}");
        }
    }
}

/// A folder for this test.
pub(crate) fn folder() -> TempDir {
    tempfile::Builder::new().prefix("multifd-it-").tempdir().expect("a temporary folder")
}

/// The names in a folder, hidden ones included.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("the folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Asserts that the folder contains exactly this.
#[track_caller]
pub(crate) fn assert_left(folder: &TempDir, expected: &[&str]) {
    assert_eq!(names(folder.path()), expected);
}

/// A connected socket, or a listening one, for the program to inherit as descriptor 0.
pub(crate) fn as_stdin(socket: impl Into<OwnedFd>) -> Stdio {
    Stdio::from(socket.into())
}

/// A small guest that is busy enough for many passes: 2 MiB rewritten, 8 MiB filled, one page in eight of it zero.
pub(crate) fn guest() -> Guest {
    Guest::new().working_set(512).filled(2048).filled_checked(256)
}

/// More rounds of [`guest`] than it takes to look at every page.
pub(crate) const ALL_CHECKED: u32 = 2048 / 256 + 2;

const MEMORY: u64 = 40 << 20;

/// A machine with [`guest`].
pub(crate) fn machine(qemu: &Qemu, machine: &str) -> VmBuilder {
    qemu.vm().machine(machine).memory(MEMORY).guest(&guest())
}

/// The source's side: the guest runs, and has done a few rounds.
pub(crate) fn source(builder: VmBuilder) -> Result<Vm, Error> {
    let mut vm = builder.start()?;
    vm.wait_round(2, PATIENCE)?;
    Ok(vm)
}

/// Sets a source up for many passes: sending what its guest rewrites takes longer than the downtime limit.
pub(crate) fn slow(source: &mut Vm) -> Result<(), Error> {
    source.set_parameters(json!({ "max-bandwidth": 20_000_000, "downtime-limit": 20 }))
}

/// Lets it complete.
pub(crate) fn fast(source: &mut Vm) -> Result<(), Error> {
    source.set_parameters(json!({ "max-bandwidth": 0, "downtime-limit": 2000 }))
}

/// Migrates a running guest in at least `passes` passes, and lets it complete.
pub(crate) fn migrate_live(source: &mut Vm, address: &str, passes: u64) -> Result<Value, Error> {
    slow(source)?;
    source.migrate(address)?;
    source.wait_passes(passes, PATIENCE)?;
    fast(source)?;
    let told = source.wait_migration("completed", PATIENCE)?;
    assert!(told["ram"]["dirty-sync-count"].as_u64() >= Some(passes), "{told}");
    Ok(told)
}

/// Migrates in one pass.
pub(crate) fn migrate(source: &mut Vm, address: &str) -> Result<Value, Error> {
    fast(source)?;
    source.migrate(address)?;
    source.wait_migration("completed", PATIENCE)
}

/// Migrates a source: running, in at least `passes` passes, or stopped. Returns its memory at the stop.
pub(crate) fn leave(source: &mut Vm, address: &str, passes: Option<u64>) -> Result<Vec<u8>, Error> {
    if let Some(passes) = passes {
        migrate_live(source, address, passes)?;
        // It is stopped since the switchover.
        return memory(source);
    }
    source.stop()?;
    let memory = memory(source)?;
    migrate(source, address)?;
    Ok(memory)
}

/// The path in a file's name for QEMU.
pub(crate) fn file_uri(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// The same, for a stream that begins at `offset`.
pub(crate) fn file_uri_at(path: &Path, offset: u64) -> String {
    format!("file:{},offset={offset:#x}", path.display())
}

/// Waits until a guest that was running when it left has checked all of its memory at `destination`.
pub(crate) fn runs_on(source: &Vm, destination: &mut Vm) -> Result<(), Error> {
    let at = source.round()?.unwrap_or_default();
    destination.wait_run_state("running", PATIENCE)?;
    destination.wait_round(at + ALL_CHECKED, PATIENCE).map(drop)
}

/// Sends a file to a waiting machine, and waits until both are done.
pub(crate) fn send(
    options: &[&str],
    file: &Path,
    destination: &mut Vm,
    listen: &str,
) -> Result<Ended, Error> {
    let address = destination.migrate_incoming(listen)?;
    let mut command = multifd(["send", "--json"]);
    let ended = Program::start(command.args(options).arg(file).arg(address)).end();
    assert_eq!(ended.code, Some(0), "{ended:?}, destination: {}", destination.stderr());
    destination.wait_migration("completed", PATIENCE)?;
    Ok(ended)
}

/// All of a stopped machine's memory, as its processor sees it.
pub(crate) fn memory(vm: &mut Vm) -> Result<Vec<u8>, Error> {
    vm.pmemsave(0, MEMORY)
}

/// The first page in which two memories differ, except where a processor does not see RAM.
pub(crate) fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    assert_eq!(one.len(), other.len());
    let pages = one.chunks(PAGE).zip(other.chunks(PAGE)).enumerate();
    pages
        .filter(|(page, _)| !NOT_RAM.contains(&(page * PAGE)))
        .find(|(_, (a, b))| a != b)
        .map(|(page, _)| page)
}

/// What a file has up to the end of its machine. What follows has the time of the capture.
pub(crate) fn machine_in(file: &Path) -> Vec<u8> {
    let mut bytes = fs::read(file).expect("the file");
    let end = bytes.windows(8).rposition(|window| window == b"mfd-tail").expect("an appendix");
    bytes.truncate(end);
    bytes
}

/// The main block of RAM in a file.
pub(crate) fn stored_memory(file: &Path) -> Vec<u8> {
    stored_memory_at(file, 0)
}

/// The same, in a file whose stream begins at `offset`.
pub(crate) fn stored_memory_at(file: &Path, offset: u64) -> Vec<u8> {
    stored_block_at(file, offset, "pc.ram")
}

/// A block of RAM in a file.
pub(crate) fn stored_block(file: &Path, name: &str) -> Vec<u8> {
    stored_block_at(file, 0, name)
}

/// The same; pages that are not present are zero.
fn stored_block_at(file: &Path, offset: u64, name: &str) -> Vec<u8> {
    let file = MappedRamFile::open(File::open(file).expect("the file"), offset).expect("a whole file");
    let (index, entry) =
        file.blocks().iter().find(|(_, entry)| entry.name.as_bytes() == name.as_bytes()).expect("RAM");
    let place = file.place(index).expect("its place");
    let present = file.bitmap(index).expect("its bitmap");
    let mut memory = vec![0; usize::try_from(entry.used_length).expect("small")];
    for (page, bytes) in memory.chunks_mut(PAGE).enumerate() {
        if present.contains(PageIndex(page as u64)) {
            let at = place.pages_offset + (page * PAGE) as u64;
            file.file().read_exact_at(bytes, at).expect("a page");
        }
    }
    memory
}

/// Makes a file of a machine without QEMU: one block of this many bytes, every page present and different.
pub(crate) fn captured(folder: &TempDir, bytes: u64) -> PathBuf {
    let path = path(folder, "captured");
    let file = File::create_new(&path).expect("a new file");
    let configuration = Configuration::new(MachineType::new("pc-q35-10.0").expect("a name"));
    let entry = BlockEntry::new(BlockName::new("pc.ram").expect("a name"), bytes);
    let blocks = BlockList::new(vec![entry], PageSize::KIB_4).expect("a list");
    let layout = Layout::new(&configuration, &blocks, SectionId(1), 0).expect("a layout");
    let name = SectionName::new("timer").expect("a name");
    let timer = Device { name, instance: 0, version: 2, state: vec![7; 24] };
    let devices = DevicePart::build(&[timer], 4096, SectionId(2)).expect("devices");
    let place = layout.places()[0];
    let words = usize::try_from(place.bitmap_words()).expect("small");
    let memory: Vec<u8> =
        (1..=bytes / PAGE as u64).flat_map(|page| [page.to_be_bytes(); PAGE / 8].concat()).collect();
    let tail = Tail { switchover_start: true, devices: &devices, about: None, base: None };
    let written = layout.write(&file, &tail, |_, _| vec![u64::MAX; words]);
    written.expect("write the file");
    file.write_all_at(&memory, place.pages_offset).expect("write the pages");
    path
}

/// A path in a folder.
pub(crate) fn path(folder: &TempDir, name: &str) -> PathBuf {
    folder.path().join(name)
}

pub(crate) const PAGE: usize = 4096;
/// From 640 KiB to 1 MiB there are holes and ROMs.
const NOT_RAM: std::ops::Range<usize> = 0xa_0000..0x10_0000;
