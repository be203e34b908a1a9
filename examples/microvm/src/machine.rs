//! The virtual machine: memory, one vCPU in its own thread, a clock, and the device to which the guest reports.
//!
//! ```text
//! boot ─▶ stopped ─ resume ─▶ running ─ stop ─▶ stopped, and its state as device sections ─▶ restore, in another process
//! ```
//!
//! UNSAFETY: the kernel is given the mapping of the guest's memory, which lives as long as the machine.
#![expect(unsafe_code, reason = "the memory slot")]

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{Builder, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kvm_bindings::{kvm_clock_data, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd::{
    channel::hand_over::SharedMemory,
    live::{DeviceInfo, DeviceName, DeviceSection, Guest, Percent, RunState},
    ram::{AtomicBitmapLog, KvmDirtyLog, MergedLog, RamBlock, RamBlocks},
};
use qemu_stream::format::{InvalidMachineType, MachineType};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    Failure,
    guest::{self, Memory},
    memory,
};

/// A virtual machine of this process.
pub(crate) struct Machine {
    memory: Memory,
    /// The memory as RAM blocks. They exist for the machine's whole life, for any number of migrations.
    pub(crate) blocks: Arc<RamBlocks>,
    region: kvm_userspace_memory_region,
    vm: Arc<VmFd>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// State that the vCPU's thread shares with others. Both wait on `changed`.
struct State {
    wanted: Wanted,
    /// Whether the thread has left the guest and waits; and whether that was between two batches.
    stands: bool,
    reported: bool,
    throttle: Percent,
    device: Device,
    /// The guest's time in nanoseconds, while it is stopped.
    clock: u64,
    cpu: (kvm_regs, kvm_sregs),
    /// An error of the guest or the kernel; the guest never runs again after it.
    wrong: Option<String>,
    /// When the guest last began to run, and when it last stopped, by the system's clock.
    times: (u128, u128),
}

#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Run,
    /// Stop at the next exit.
    Stop,
    /// Stop between two batches.
    Look,
    Quit,
}

/// The device: receives reports and limits the guest to its rate.
#[derive(Clone, Copy)]
struct Device {
    size: u64,
    /// Bytes per second.
    rate: u64,
    batches: u64,
}

/// The state of a machine.
pub(crate) struct Health {
    pub(crate) batches: u64,
    pub(crate) wrong: Option<String>,
    /// Nanoseconds since 1970: when it last began to run, and when it last stopped.
    pub(crate) times: (u128, u128),
}

impl Machine {
    /// Creates a machine whose guest has not begun, in `memory` of `size` bytes.
    pub(crate) fn boot(memory: Memory, size: u64, rate: u64) -> Result<Self, Failure> {
        let blocks = Arc::new(memory::blocks(&memory)?);
        guest::load(&memory, size)?;
        let mut cpu = (kvm_regs { rip: guest::CODE, rflags: 2, ..Default::default() }, kvm_sregs::default());
        let (kvm, vm) = open()?;
        let vcpu = vm.create_vcpu(0)?;
        cpu.1 = vcpu.get_sregs()?;
        protected_mode(&mut cpu.1);
        Self::new((memory, blocks), (kvm, vm, vcpu), Device { size, rate, batches: 0 }, 0, cpu)
    }

    /// The machine's type, which source and destination compare.
    pub(crate) fn machine_type() -> Result<MachineType, InvalidMachineType> {
        MachineType::new("multifd-microvm")
    }

    /// The pages that are written: by the vCPU, logged by the kernel, and by the device, which goes through `vm-memory`.
    pub(crate) fn dirty_log(&self) -> io::Result<MergedLog<'_>> {
        // SAFETY: this is the machine's one slot, which nobody sets while the machine is borrowed.
        let vcpus = unsafe { KvmDirtyLog::start(&self.vm, vec![self.region], &self.blocks) }?;
        let devices = AtomicBitmapLog::new(&self.memory, &self.blocks)?;
        Ok(MergedLog::new().with("the vCPU", vcpus).with("the device", devices))
    }

    /// Restores a machine from its memory and its sections.
    pub(crate) fn restore(
        memory: Memory,
        blocks: Arc<RamBlocks>,
        section: impl Fn(&str) -> Option<Vec<u8>>,
    ) -> Result<Self, Failure> {
        let body = |name: &str, length| {
            let body = section(name).ok_or_else(|| format!("section {name:?} is missing"))?;
            if body.len() == length {
                Ok(body)
            } else {
                Err(format!("section {name:?} has {} bytes", body.len()))
            }
        };
        let numbers = |name: &str, count: usize| {
            let body = body(name, count * 8)?;
            let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
            Ok::<_, String>(body.chunks(8).map(number).collect::<Vec<u64>>())
        };
        let device = numbers(REPORT.as_str(), 3)?;
        let device = Device { size: device[0], rate: device[1], batches: device[2] };
        if device.size != total(&memory) {
            return Err("the saved memory size of the device differs from the size of the memory".into());
        }
        let cpu = body(VCPU.as_str(), size_of::<kvm_regs>() + size_of::<kvm_sregs>())?;
        let (regs, sregs) = cpu.split_at(size_of::<kvm_regs>());
        let unfit = |_| "the vCPU's state cannot be read";
        let regs = kvm_regs::read_from_bytes(regs).map_err(|_| unfit(()))?;
        let sregs = kvm_sregs::read_from_bytes(sregs).map_err(|_| unfit(()))?;
        let (kvm, vm) = open()?;
        let vcpu = vm.create_vcpu(0)?;
        Self::new((memory, blocks), (kvm, vm, vcpu), device, numbers(CLOCK.as_str(), 1)?[0], (regs, sregs))
    }

    fn new(
        (memory, blocks): (Memory, Arc<RamBlocks>),
        (_kvm, vm, vcpu): (Kvm, VmFd, VcpuFd),
        device: Device,
        clock: u64,
        cpu: (kvm_regs, kvm_sregs),
    ) -> Result<Self, Failure> {
        let mapped = memory.iter().next().ok_or("the machine has no memory")?.get_mmap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: device.size,
            userspace_addr: mapped.as_ptr().addr() as u64,
        };
        // SAFETY: the region is mapped that long, and the machine keeps the memory until its thread has ended.
        unsafe { vm.set_user_memory_region(region) }?;
        let vm = Arc::new(vm);
        vcpu.set_sregs(&cpu.1)?;
        vcpu.set_regs(&cpu.0)?;
        let state = State {
            wanted: Wanted::Stop,
            stands: false,
            reported: true,
            throttle: Percent::NONE,
            device,
            clock,
            cpu,
            wrong: None,
            times: (0, 0),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let mut run = Vcpu {
            vcpu,
            vm: vm.clone(),
            memory: memory.clone(),
            shared: shared.clone(),
            due: None,
            stood: Duration::ZERO,
        };
        let thread = Builder::new().name("vcpu_0".into()).spawn(move || run.run())?;
        Ok(Self { memory, blocks, region, vm, shared, thread: Some(thread) })
    }

    /// The memory as blocks that another process of this host gets by descriptor.
    pub(crate) fn shared(&self) -> Result<(RamBlocks, Vec<SharedMemory>), Failure> {
        let blocks = memory::blocks(&self.memory)?.into_iter().map(RamBlock::ignored).collect();
        let blocks = RamBlocks::new(blocks)?;
        let files = self.memory.iter().zip(blocks.iter()).map(|(region, (_, block))| {
            let file =
                region.file_offset().ok_or("start the machine with --shared to hand its memory over")?;
            let (offset, file) = (file.start(), file.file().try_clone()?);
            Ok(SharedMemory { block: block.name().clone(), file, offset, length: block.used_length() })
        });
        let files = files.collect::<Result<_, Failure>>()?;
        Ok((blocks, files))
    }

    /// Starts or resumes the guest.
    pub(crate) fn run(&self) {
        self.shared.want(Wanted::Run);
    }

    /// The state of the machine.
    pub(crate) fn health(&self) -> Health {
        let state = self.shared.lock();
        Health { batches: state.device.batches, wrong: state.wrong.clone(), times: state.times }
    }

    /// Stops the guest for a moment and checks all of its memory: returns the number of wrong bytes and of all bytes.
    pub(crate) fn verify(&self) -> Result<(u64, u64), Failure> {
        let device = self.shared.stand(Wanted::Look).device;
        let wrong = guest::wrong_bytes(&self.memory, device.size, device.batches);
        self.run();
        Ok((wrong?, guest::pages(device.size) * guest::PAGE as u64))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.want(Wanted::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The methods that a migration calls.
impl Guest for &Machine {
    fn devices(&self) -> Vec<DeviceInfo> {
        let cpu = size_of::<kvm_regs>() + size_of::<kvm_sregs>();
        vec![DeviceInfo::new(VCPU, cpu as u64), DeviceInfo::new(CLOCK, 8), DeviceInfo::new(REPORT, 24)]
    }

    fn run_state(&mut self) -> RunState {
        RunState::Running
    }

    /// This guest exits every few milliseconds, to read the clock and to report, and is stopped then. A guest that does
    /// not exit gets a signal, whose handler sets `immediate_exit`.
    fn stop(&mut self) -> io::Result<()> {
        let state = self.shared.stand(Wanted::Stop);
        match &state.wrong {
            // Such a guest is stopped already, permanently.
            Some(wrong) => Err(io::Error::other(wrong.clone())),
            None => Ok(()),
        }
    }

    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        let state = self.shared.lock();
        let section = |name, data| DeviceSection { name, instance_id: 0, version: 1, data };
        let numbers = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
        let Device { size, rate, batches } = state.device;
        // A vCPU of a larger guest has more state: FPU, MSRs, events, local APIC. This one uses none of it.
        let cpu = [state.cpu.0.as_bytes(), state.cpu.1.as_bytes()].concat();
        Ok(vec![
            section(VCPU, cpu),
            section(CLOCK, numbers(&[state.clock])),
            section(REPORT, numbers(&[size, rate, batches])),
        ])
    }

    fn resume(&mut self) {
        self.run();
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, stand: Percent) -> io::Result<()> {
        self.shared.lock().throttle = stand;
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        self.changed.notify_all();
    }

    /// Returns when the vCPU is stopped.
    fn stand(&self, wanted: Wanted) -> MutexGuard<'_, State> {
        self.want(wanted);
        let running = |state: &mut State| {
            !state.stands || wanted == Wanted::Look && !state.reported && state.wrong.is_none()
        };
        self.changed.wait_while(self.lock(), running).unwrap_or_else(PoisonError::into_inner)
    }
}

/// The vCPU, in its thread.
struct Vcpu {
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    memory: Memory,
    shared: Arc<Shared>,
    /// When the guest began to run, and the batches it had done then: its rate is computed from these.
    due: Option<(Instant, u64)>,
    /// The time for which it has been throttled since then.
    stood: Duration,
}

impl Vcpu {
    fn run(&mut self) {
        while self.may_run() {
            let entered = Instant::now();
            let ran = self.until_exit();
            let mut state = self.shared.lock();
            self.stood += state.throttle.pause_after(entered.elapsed());
            match ran {
                Ok(reported) => {
                    state.reported = reported;
                    state.device.batches += u64::from(reported);
                }
                Err(error) => state.wrong = Some(error.to_string()),
            }
        }
    }

    /// Whether to enter the guest again; waits here as long as the guest must not run.
    fn may_run(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        loop {
            let stand = match state.wanted {
                Wanted::Quit => return false,
                Wanted::Run => state.wrong.is_some(),
                Wanted::Look => state.reported || state.wrong.is_some(),
                Wanted::Stop => true,
            };
            if stand {
                if !state.stands {
                    self.leave(&mut state);
                    shared.changed.notify_all();
                }
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.stands || self.due.is_none() {
                self.enter(&mut state);
            }
            // The device enforces the rate: the guest must not continue too early.
            let Some((since, done)) = self.due.filter(|_| state.reported) else { return true };
            let bytes = (state.device.batches - done) * guest::BATCH * guest::PAGE as u64;
            let time = Duration::from_secs_f64(bytes as f64 / state.device.rate.max(1) as f64);
            let left = (time + self.stood).saturating_sub(since.elapsed());
            if left.is_zero() {
                return true;
            }
            let waited = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
        }
    }

    /// Completes the last exit without running the guest, and saves the state.
    fn leave(&mut self, state: &mut State) {
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        let saved = self.vcpu.get_regs().and_then(|regs| Ok((regs, self.vcpu.get_sregs()?)));
        let clock =
            if self.due.is_some() { self.vm.get_clock().map(|clock| clock.clock) } else { Ok(state.clock) };
        match (completed, saved, clock) {
            (Err(error), Ok(cpu), Ok(clock)) if error.errno() == INTERRUPTED => {
                (state.cpu, state.clock) = (cpu, clock);
            }
            other => {
                state.wrong = state.wrong.take().or(Some(format!("the vCPU cannot be stopped: {other:?}")));
            }
        }
        (state.stands, state.times.1, self.due) = (true, now(), None);
    }

    /// Sets the clock to its last value: time for which the guest did not run has not passed for it.
    fn enter(&mut self, state: &mut State) {
        let clock = kvm_clock_data { clock: state.clock, ..Default::default() };
        if let Err(error) = self.vm.set_clock(&clock) {
            state.wrong = Some(format!("the clock cannot be set: {error}"));
        }
        (state.stands, state.times.0) = (false, now());
        (self.due, self.stood) = (Some((Instant::now(), state.device.batches)), Duration::ZERO);
    }

    /// Runs the guest until the next exit, and handles it. Returns whether it was a report.
    fn until_exit(&mut self) -> Result<bool, Failure> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(guest::REPORT, data)) => {
                let found = u32::read_from_bytes(data).map_err(|_| "a report of four bytes")?;
                let expected = guest::low(self.shared.lock().device.batches + 1);
                if found != expected {
                    return Err(format!("expected report {expected}, found {found}").into());
                }
                // Written through `vm-memory`, which records it, like a device that writes to guest memory.
                self.memory.write_obj(found, GuestAddress(guest::MAILBOX))?;
                Ok(true)
            }
            Ok(VcpuExit::IoIn(guest::CLOCK, data)) => {
                let millis = guest::low(self.vm.get_clock()?.clock / 1_000_000);
                data.copy_from_slice(millis.as_bytes());
                Ok(false)
            }
            Ok(VcpuExit::IoOut(guest::WRONG, data)) => {
                let at = u32::read_from_bytes(data).map_err(|_| "an address of four bytes")?;
                Err(format!("the guest found wrong bytes in its memory near {at:#x}").into())
            }
            Err(error) if error.errno() == INTERRUPTED => Ok(false),
            other => Err(format!("the vCPU exited for an unknown reason: {other:?}").into()),
        }
    }
}

fn total(memory: &Memory) -> u64 {
    memory.iter().map(|region| region.get_mmap().size() as u64).sum()
}

fn open() -> Result<(Kvm, VmFd), Failure> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(0xfffb_d000)?;
    Ok((kvm, vm))
}

/// Flat segments over all memory, without paging.
fn protected_mode(sregs: &mut kvm_sregs) {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(8, 11);
    (sregs.ds, sregs.es, sregs.ss) = (flat(16, 3), flat(16, 3), flat(16, 3));
    sregs.cr0 |= 1;
}

fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos())
}

const VCPU: DeviceName = DeviceName::from_static("vcpu");
const CLOCK: DeviceName = DeviceName::from_static("clock");
const REPORT: DeviceName = DeviceName::from_static("report");
const INTERRUPTED: i32 = 4;
