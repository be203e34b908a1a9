//! Machines that are captured as they are at one moment, while their guests write.

#![cfg(test)]

use std::{
    fs::File,
    io,
    process::Command,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use multifd::{
    channel::Stop,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, RunState},
    ram::{
        Access, BlockName, CopierError, CopierOptions, FaultError, Mapping, Memory, PageIndex, PageSize,
        RamBlock, RamBlocks,
    },
};
use multifd_testkit::HugePages;
use qemu_stream::{
    format::{Configuration, MachineType},
    mapped_ram::{
        Base, Capture, CaptureOptions, MappedRamFile, MomentCapture, MomentError, Restore, StoredMachine,
        Verify,
    },
};
use rustix::fs::{MemfdFlags, memfd_create};

const LIMIT: Option<Duration> = Some(Duration::from_secs(60));
const PAGES: u64 = 4096;
const BLOCKS: [(&str, u64); 2] = [("ram", PAGES << 12), ("rom", 0x3000)];

fn memory(shared: bool) -> Arc<RamBlocks> {
    memory_with(if shared { Some(MemfdFlags::empty()) } else { None })
}

/// Anonymous memory, or "ram" in a memory file.
fn memory_with(file: Option<MemfdFlags>) -> Arc<RamBlocks> {
    let block = |(name, length): &(&str, u64)| {
        // The smaller block is no whole huge page.
        let flags = file.map(|flags| if *length < HugePages::BYTES { MemfdFlags::empty() } else { flags });
        let mapping = if let Some(flags) = flags {
            let file = File::from(memfd_create(*name, flags | MemfdFlags::CLOEXEC).expect("a memfd"));
            file.set_len(*length).expect("longer");
            Mapping::of_file(&file, 0, *length, Access::ReadWrite).expect("mapped")
        } else {
            Mapping::anonymous(*length).expect("memory")
        };
        let name = BlockName::new(name).expect("a name");
        RamBlock::new(name, *length, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block")
    };
    // The other order than in the file would be found, too.
    Arc::new(RamBlocks::new(BLOCKS.iter().rev().map(block).collect()).expect("distinct"))
}

fn ram(blocks: &RamBlocks) -> &RamBlock {
    blocks.get(blocks.find(b"ram").expect("there")).expect("there")
}

fn pages(blocks: &RamBlocks) -> Vec<Vec<u8>> {
    let page = |block: &RamBlock, page| {
        let mut bytes = vec![0; 4096];
        block.slice(PageIndex(page), 1).expect("mapped").copy_to(&mut bytes);
        bytes
    };
    let names = ["ram", "rom"].map(|name| blocks.find(name.as_bytes()).expect("there"));
    let all = names.iter().map(|index| blocks.get(*index).expect("there"));
    all.flat_map(|block| (0..block.pages()).map(move |at| page(block, at))).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Stand,
    Quit,
}

/// What the guest's threads and its owner share.
struct Shared {
    state: Mutex<(Want, usize)>,
    changed: Condvar,
    stamps: AtomicU64,
}

/// What the guest does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Nothing,
    StopFails,
    StopPanics,
    SaveFails,
    SavePanics,
    ResumePanics,
}

/// A guest whose threads write a new stamp to all of a page, all the time.
struct Busy {
    blocks: Arc<RamBlocks>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    fault: Fault,
    at_stop: Vec<Vec<u8>>,
    resumed: usize,
}

const THREADS: u64 = 2;

impl Busy {
    fn start(blocks: &Arc<RamBlocks>) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new((Want::Run, 0)),
            changed: Condvar::new(),
            stamps: AtomicU64::new(1),
        });
        let thread = |number| {
            let (blocks, shared) = (blocks.clone(), shared.clone());
            thread::spawn(move || shared.write(&blocks, number))
        };
        let threads = (0..THREADS).map(thread).collect();
        let (blocks, at_stop) = (blocks.clone(), Vec::new());
        let guest = Self { blocks, shared, threads, fault: Fault::Nothing, at_stop, resumed: 0 };
        guest.shared.more(500);
        guest
    }

    fn want(&self, want: Want) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = want;
        self.shared.changed.notify_all();
        if want == Want::Stand {
            let threads = usize::try_from(THREADS).expect("few");
            let stand = self.shared.changed.wait_while(state, |state| state.1 < threads);
            drop(stand.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Shared {
    fn write(&self, blocks: &RamBlocks, number: u64) {
        let mut random = number + 1;
        loop {
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.0 == Want::Stand {
                    state.1 += 1;
                    self.changed.notify_all();
                    let stands = |state: &mut (Want, usize)| state.0 == Want::Stand;
                    state = self.changed.wait_while(state, stands).unwrap_or_else(PoisonError::into_inner);
                    state.1 -= 1;
                }
                if state.0 == Want::Quit {
                    return;
                }
            }
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // A part of the pages stays zero.
            let page = (random % (PAGES / 2 / THREADS)) * THREADS + number;
            let stamp = self.stamps.fetch_add(1, Ordering::SeqCst);
            let bytes = stamp.to_be_bytes().repeat(512);
            ram(blocks).slice(PageIndex(page), 1).expect("mapped").copy_from(&bytes);
        }
    }

    /// Waits until the guest has written more pages.
    fn more(&self, stamps: u64) {
        let until = self.stamps.load(Ordering::SeqCst) + stamps;
        let limit = Instant::now() + Duration::from_secs(60);
        while self.stamps.load(Ordering::SeqCst) < until {
            assert!(Instant::now() < limit, "the guest hangs");
            thread::yield_now();
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.want(Want::Quit);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Guest for Busy {
    fn devices(&self) -> Vec<DeviceInfo> {
        vec![DeviceInfo::new(DeviceName::from_static("vcpu"), 8)]
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        match self.fault {
            Fault::StopFails => return Err(io::Error::other("not now")),
            Fault::StopPanics => {
                self.want(Want::Stand);
                panic!("while stopping");
            }
            _ => {}
        }
        self.want(Want::Stand);
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        match self.fault {
            Fault::SaveFails => return Err(io::Error::other("no state")),
            Fault::SavePanics => panic!("while saving"),
            _ => {}
        }
        // It may write to memory.
        ram(&self.blocks).store(PageIndex(PAGES - 1), &[0x5a; 4096]).expect("stored");
        self.at_stop = pages(&self.blocks);
        let name = DeviceName::from_static("vcpu");
        Ok(vec![DeviceSection { name, instance_id: 0, version: 1, data: vec![7; 8] }])
    }
    fn resume(&mut self) {
        assert!(self.fault != Fault::ResumePanics, "while resuming");
        self.resumed += 1;
        self.want(Want::Run);
    }
}

fn capture(file: &File, blocks: &RamBlocks) -> Capture {
    let machine = Configuration::new(MachineType::new("my-vmm-1").expect("a name"));
    let file = file.try_clone().expect("a descriptor");
    Capture::of_guest(file, machine, blocks, &CaptureOptions::new().digests(true)).expect("laid out")
}

/// `None` if this system does not let a process serve page faults.
fn begin(
    file: &File,
    blocks: &Arc<RamBlocks>,
    guest: &mut Busy,
) -> Option<Result<MomentCapture, MomentError>> {
    let options = CopierOptions::new().sole_writer(true);
    match capture(file, blocks).at_moment(blocks, guest, options) {
        Err(MomentError::Copier(CopierError::Fault(
            error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. }),
        ))) => {
            multifd_testkit::lacks(&error.to_string());
            None
        }
        other => Some(other),
    }
}

#[test]
fn a_busy_guest_is_in_the_file_as_it_was_when_it_was_stopped() {
    let reserved = HugePages::reserve((PAGES << 12) / HugePages::BYTES);
    let huge = reserved.as_ref().map(|_| Some(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB));
    for kind in [Some(None), Some(Some(MemfdFlags::empty())), huge].into_iter().flatten() {
        let (blocks, file) = (memory_with(kind), tempfile::tempfile().expect("a file"));
        let mut guest = Busy::start(&blocks);
        for _ in 0..3 {
            let Some(begun) = begin(&file, &blocks, &mut guest) else { return };
            let mut capture = begun.expect("captured");
            guest.shared.more(500);
            let stats = capture.finish(LIMIT).expect("complete");
            assert!(capture.pause() > Duration::ZERO && stats.stored > 0, "{stats:?}");
            guest.shared.more(500);
            let machine = MappedRamFile::open(file.try_clone().expect("a descriptor"), 0).expect("whole");
            assert_eq!(machine.devices().find("vcpu", 0).map(|found| found.1), Some(&[7; 8][..]));
            let verified = Verify::new(&machine).run(&AtomicU64::new(0), &Stop::new()).expect("read");
            assert!(verified.damage.is_empty(), "{verified:?}");
            let restored = memory(false);
            Restore::new(&machine).run(&restored, &Stop::new()).expect("restored");
            for (number, (found, expected)) in pages(&restored).iter().zip(&guest.at_stop).enumerate() {
                assert!(found == expected, "page {number} is not as it was at the stop");
            }
            assert!(pages(&blocks) != guest.at_stop, "the guest does not write");
        }
        assert_eq!(guest.resumed, 3);
    }
}

#[test]
fn a_guest_that_fails_or_panics_is_resumed_and_the_file_has_no_machine() {
    for fault in [Fault::StopFails, Fault::StopPanics, Fault::SaveFails, Fault::SavePanics] {
        let (blocks, file) = (memory(false), tempfile::tempfile().expect("a file"));
        let mut guest = Busy::start(&blocks);
        guest.fault = fault;
        let Some(begun) = begin(&file, &blocks, &mut guest) else { return };
        let error = begun.expect_err("refused");
        assert!(matches!(error, MomentError::Guest { .. } | MomentError::Panicked { .. }), "{error}");
        // A guest that could not be stopped was never stopped.
        assert_eq!(guest.resumed, usize::from(fault != Fault::StopFails), "{fault:?}");
        guest.shared.more(10_000);
        assert_eq!(file.metadata().expect("its length").len(), 0, "{fault:?}");
        // The next one succeeds.
        guest.fault = Fault::Nothing;
        let mut next = begin(&file, &blocks, &mut guest).expect("allowed").expect("captured");
        next.finish(LIMIT).expect("complete");
    }
    let (blocks, file) = (memory(false), tempfile::tempfile().expect("a file"));
    let mut guest = Busy::start(&blocks);
    guest.fault = Fault::ResumePanics;
    let error = begin(&file, &blocks, &mut guest).expect("allowed").expect_err("refused");
    assert!(matches!(error, MomentError::NotResumed { source: None, .. }), "{error}");
    guest.want(Want::Run);
    guest.shared.more(10_000);
}

#[test]
fn a_capture_that_is_cancelled_or_dropped_leaves_no_machine_and_the_guest_continues() {
    for is_cancelled in [true, false] {
        let (blocks, file) = (memory(false), tempfile::tempfile().expect("a file"));
        let mut guest = Busy::start(&blocks);
        let Some(begun) = begin(&file, &blocks, &mut guest) else { return };
        let mut capture = begun.expect("captured");
        if is_cancelled {
            capture.copier().clone().stop();
            match capture.finish(LIMIT) {
                Err(MomentError::Copier(CopierError::Cancelled)) => {}
                // It was faster.
                Ok(_) => continue,
                Err(error) => panic!("{error}"),
            }
        }
        drop(capture);
        guest.shared.more(10_000);
        assert_eq!(file.metadata().expect("its length").len(), 0);
    }
}

/// Runs in a process of its own, with a small file system.
#[test]
fn a_full_disk_ends_the_capture_and_the_guest_continues() {
    const SMALL: &str = "MULTIFD_MOMENT_SMALL";
    let Some(folder) = std::env::var_os(SMALL) else {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c"]);
        command.arg(format!("mount -t tmpfs -o size=4M none \"${SMALL}\" || exit 77; exec \"$0\" \"$@\""));
        command.arg(std::env::current_exe().expect("this program"));
        command.args(["--exact", "a_full_disk_ends_the_capture_and_the_guest_continues"]);
        let done = command.env(SMALL, folder.path()).output();
        match done {
            Ok(done) if done.status.code() == Some(77) => multifd_testkit::lacks("mounts of its own"),
            Ok(done) => {
                let said = String::from_utf8_lossy(&done.stderr);
                let result = String::from_utf8_lossy(&done.stdout);
                assert!(done.status.success(), "{said}{result}");
                assert!(result.contains("1 passed"), "the test was found");
            }
            Err(error) => multifd_testkit::lacks(&format!("unshare: {error}")),
        }
        return;
    };
    let path = std::path::Path::new(&folder).join("machine.ram");
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("a file");
    let blocks = memory(false);
    let mut guest = Busy::start(&blocks);
    // Pages of the upper half, which the guest leaves alone.
    (PAGES / 2..PAGES).for_each(|page| {
        ram(&blocks).store(PageIndex(page), &page.to_be_bytes().repeat(512)).expect("stored");
    });
    let Some(begun) = begin(&file, &blocks, &mut guest) else { return };
    let mut capture = begun.expect("captured");
    let error = capture.finish(LIMIT).expect_err("the disk is full");
    assert!(matches!(error, MomentError::Copier(CopierError::Store { .. })), "{error}");
    let text = multifd::error::chain(&error).to_string();
    assert!(text.contains("No space left"), "{text}");
    guest.shared.more(10_000);
    assert_eq!(file.metadata().expect("its length").len(), 0);
}

#[test]
fn shared_memory_is_refused_unless_nobody_else_writes_to_it() {
    let (blocks, file) = (memory(true), tempfile::tempfile().expect("a file"));
    let mut guest = Busy::start(&blocks);
    let refused = capture(&file, &blocks).at_moment(&blocks, &mut guest, CopierOptions::new());
    match refused.expect_err("refused") {
        MomentError::Copier(CopierError::Shared { .. } | CopierError::Fault(_)) => {}
        error => panic!("{error}"),
    }
    assert_eq!((guest.resumed, guest.at_stop.len()), (0, 0), "the guest was not stopped");
    guest.shared.more(1000);
}

/// In a delta, a page that is left out is the page of the base, and not zero.
#[test]
fn a_capture_with_a_base_is_refused_before_the_guest_is_stopped() {
    let (blocks, folder) = (memory(false), tempfile::tempdir().expect("a folder"));
    let open = |name: &str| {
        let path = folder.path().join(name);
        File::options().read(true).write(true).create(true).truncate(false).open(path).expect("a file")
    };
    let mut guest = Busy::start(&blocks);
    let Some(begun) = begin(&open("base.ram"), &blocks, &mut guest) else { return };
    begun.expect("captured").finish(LIMIT).expect("complete");
    let base = StoredMachine::open(&folder.path().join("base.ram"), 0).expect("whole");
    let base = Base::new(&base, "base.ram").expect("a base");
    let machine = Configuration::new(MachineType::new("my-vmm-1").expect("a name"));
    let delta = Capture::since(&base, open("delta.ram"), machine, &blocks, &CaptureOptions::new());
    let refused = delta.expect("laid out").at_moment(&blocks, &mut guest, CopierOptions::new());
    assert!(matches!(refused, Err(MomentError::Delta)), "{refused:?}");
    assert_eq!(guest.resumed, 1, "it was not stopped again");
    guest.shared.more(1000);
}

/// The kernel lets one of them have the memory. The guest is not stopped for the one that is refused.
#[test]
fn a_second_capture_of_one_guest_is_refused_by_name_and_the_first_completes() {
    let (blocks, files) = (memory(false), [(); 2].map(|()| tempfile::tempfile().expect("a file")));
    let mut guest = Busy::start(&blocks);
    let Some(begun) = begin(&files[0], &blocks, &mut guest) else { return };
    let mut first = begun.expect("captured");
    // While it is copied, or just after that.
    let second = begin(&files[1], &blocks, &mut guest).expect("allowed");
    match second {
        Err(error) => {
            let text = multifd::error::chain(&error).to_string();
            assert!(text.contains("another capture of one moment"), "{text}");
            assert!(matches!(error, MomentError::Copier(CopierError::Fault(FaultError::Watched { .. }))));
            assert_eq!(guest.resumed, 1, "the guest was stopped for it");
            assert_eq!(files[1].metadata().expect("its length").len(), 0);
        }
        Ok(_) => assert_eq!(first.copier().left(), 0, "two captures have the memory"),
    }
    first.finish(LIMIT).expect("complete");
    guest.shared.more(1000);
    begin(&files[1], &blocks, &mut guest)
        .expect("allowed")
        .expect("captured")
        .finish(LIMIT)
        .expect("complete");
}

/// The process that captures is killed at random moments. Whatever is in its files then: what counts as a whole machine is one.
#[test]
fn a_file_of_a_capture_that_was_killed_is_never_taken_for_a_whole_machine() {
    use std::io::BufRead;
    let (mut whole, mut torn) = (0, 0);
    for round in 0..12_u64 {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--ignored", "--exact", "captures_until_it_is_killed", "--nocapture"]);
        command.env(KILLED, folder.path()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().expect("started");
        let mut lines = io::BufReader::new(child.stdout.take().expect("its output")).lines();
        let mut announced = Vec::new();
        let mut read = |until: &dyn Fn(&str) -> bool| {
            for line in lines.by_ref().map_while(Result::ok) {
                if let Some(name) = line.strip_prefix("complete ") {
                    announced.push(name.to_owned());
                }
                if until(&line) {
                    return true;
                }
            }
            false
        };
        // At another moment of another capture each time.
        let begins = format!("begins {}", round % 3);
        if !read(&|line| line == begins || line == "lacks") {
            panic!("the process that captures has ended");
        }
        thread::sleep(Duration::from_micros(round * 1700 % 20_000));
        child.kill().expect("killed");
        child.wait().expect("ended");
        read(&|_| false);
        let files: Vec<_> = std::fs::read_dir(folder.path()).expect("listed").collect();
        if files.is_empty() {
            return multifd_testkit::lacks("a process that may serve page faults");
        }
        for file in files {
            let path = file.expect("there").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            match MappedRamFile::open(File::open(&path).expect("opened"), 0) {
                Ok(machine) => {
                    let verified = Verify::new(&machine).run(&AtomicU64::new(0), &Stop::new()).expect("read");
                    assert!(verified.damage.is_empty(), "{name}: {verified:?}");
                    assert!(machine.devices().find("vcpu", 0).is_some(), "{name} has no devices");
                    whole += 1;
                }
                Err(_) => {
                    assert!(!announced.contains(&name), "{name} was complete");
                    torn += 1;
                }
            }
        }
    }
    assert!(whole > 0 && torn > 0, "{whole} whole files, and {torn} others: the moments are not random");
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn captures_until_it_is_killed() {
    let Some(folder) = std::env::var_os(KILLED).map(std::path::PathBuf::from) else { return };
    let blocks = memory(false);
    (0..PAGES).for_each(|page| ram(&blocks).store(PageIndex(page), &[7; 4096]).expect("stored"));
    let mut guest = Busy::start(&blocks);
    for number in 0.. {
        let file = File::create_new(folder.join(number.to_string())).expect("a file");
        drop(file);
        let file = File::options().read(true).write(true).open(folder.join(number.to_string()));
        let file = file.expect("a file");
        println!("begins {number}");
        let Some(begun) = begin(&file, &blocks, &mut guest) else {
            std::fs::remove_file(folder.join(number.to_string())).expect("removed");
            println!("lacks");
            return;
        };
        begun.expect("captured").finish(LIMIT).expect("complete");
        println!("complete {number}");
    }
}

const KILLED: &str = "MULTIFD_MOMENT_KILLED";
