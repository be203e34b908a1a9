//! Faults of vCPUs.
//!
//! UNSAFETY: memory slots are set to mappings that the machine keeps.
#![expect(unsafe_code, reason = "a virtual machine's memory")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use guest_ram::{
    Armed, DirtyLog, DirtyPages, KvmDirtyLog, Mapping, PageBitmap, Pager, PagerOptions, RamBlocks,
};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::{
    copier::{Kept, options, prepare, write_page},
    kit::{self, BLOCK, LIMIT},
    pager::{Source, expected},
};

/// Adds the first byte of each of edx pages from edi on to ebx, and writes esi over its second word; then exits with an OUT.
const PROGRAM: [u8; 22] = [
    0x0f, 0xb6, 0x07, // movzx eax, byte [edi]
    0x01, 0xc3, // add ebx, eax
    0x89, 0x77, 0x04, // mov [edi+4], esi
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x4a, // dec edx
    0x75, 0xef, // jnz
    0xe6, 0x10, // out 0x10, al
    0xf4, 0xf4, 0xf4, // hlt
];

const CODE: u64 = 0xc000_0000;
const PAGES: u64 = 4096;
const WRITTEN: u8 = 0xa5;

fn vcpu(vm: &VmFd, id: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(id).expect("a vCPU");
    let mut sregs = vcpu.get_sregs().expect("registers");
    let flat = |selector, type_| kvm_segment {
        base: 0,
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
    vcpu.set_sregs(&sregs).expect("registers");
    vcpu
}

/// Runs the program over half of the pages. Returns the sum; `None` if the vCPU could not access a page.
fn run(mut vcpu: VcpuFd, half: u64) -> Option<u64> {
    write(&mut vcpu, half, WRITTEN)
}

/// Like [`run`], with the byte that is written.
fn write(vcpu: &mut VcpuFd, half: u64, byte: u8) -> Option<u64> {
    let (pages, rsi) = (PAGES / 2, u64::from(u32::from_be_bytes([byte; 4])));
    let rdi = (half * pages) << 12;
    let regs = kvm_regs { rip: CODE, rflags: 2, rdi, rsi, rdx: pages, ..Default::default() };
    vcpu.set_regs(&regs).expect("registers");
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => return Some(vcpu.get_regs().expect("registers").rbx),
            Err(error) if error.errno() == libc::EINTR && !BUS_ERROR.load(Ordering::Relaxed) => {}
            Err(error) if error.errno() == libc::EINTR => return None,
            // What a kernel makes of RAM that it cannot access while it emulates the instruction.
            Ok(VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _)) if address < PAGES << 12 => {
                return None;
            }
            Err(error) if [libc::EFAULT, libc::EHWPOISON].contains(&error.errno()) => return None,
            other => panic!("found {other:?}"),
        }
    }
}

/// Set by the signal that most kernels send to the thread of the vCPU.
static BUS_ERROR: AtomicBool = AtomicBool::new(false);

extern "C" fn bus_error(_: libc::c_int) {
    BUS_ERROR.store(true, Ordering::Relaxed);
}

fn note_bus_errors() {
    let handler = bus_error as *const () as libc::sighandler_t;
    // SAFETY: the handler only sets a flag.
    assert_ne!(unsafe { libc::signal(libc::SIGBUS, handler) }, libc::SIG_ERR);
}

fn slot(
    slot: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr }
}

fn ram_slot(address: u64) -> kvm_userspace_memory_region {
    slot(0, 0, PAGES << 12, address)
}

fn machine(blocks: &RamBlocks) -> Option<(VmFd, Vec<VcpuFd>, Mapping)> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            multifd_testkit::skip(&format!("/dev/kvm cannot be opened: {error}"));
            return None;
        }
    };
    let vm = kvm.create_vm().expect("a virtual machine");
    vm.set_tss_address(0xfffb_d000).expect("a place for the task state");
    let code = Mapping::anonymous(4096).expect("memory");
    code.slice(0, PROGRAM.len()).expect("inside").copy_from(&PROGRAM);
    let ram = kit::page_of(blocks, 0).as_ptr().addr() as u64;
    let program = code.slice(0, 1).expect("inside").as_ptr().addr() as u64;
    for region in [ram_slot(ram), slot(1, CODE, 4096, program)] {
        // SAFETY: blocks and code are mapped that long, and outlive the machine.
        unsafe { vm.set_user_memory_region(region) }.expect("a slot");
    }
    let vcpus = (0..2).map(|id| vcpu(&vm, id)).collect();
    Some((vm, vcpus, code))
}

#[test]
fn vcpus_find_every_page_while_it_comes_and_keep_what_they_write() {
    let (blocks, source) = (kit::anonymous(PAGES), Arc::new(Source::new(PAGES)));
    let Some((_vm, vcpus, _code)) = machine(&blocks) else { return };
    let Some(userfault) = kit::open(Pager::NEEDS) else { return };
    let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
    let options = PagerOptions::new().prefetch_bytes(16 << 12);
    let pager = Pager::start(armed, source, options).expect("started");
    let runs = (0..).zip(vcpus).map(|(half, vcpu)| thread::spawn(move || run(vcpu, half)));
    let sums: Vec<_> =
        runs.collect::<Vec<_>>().into_iter().map(|run| run.join().expect("no panic")).collect();
    let sum = |half: u64| {
        (half * PAGES / 2..(half + 1) * PAGES / 2).map(|page| u64::from(expected(page))).sum::<u64>()
    };
    assert_eq!(sums, [Some(sum(0)), Some(sum(1))]);
    let stats = pager.finish(Some(LIMIT)).expect("all there");
    assert!(stats.faults > 0, "{stats:?}");
    for page in 0..PAGES {
        let mut bytes = [expected(page); 4096];
        bytes[4..8].fill(WRITTEN);
        assert_eq!(kit::read_page(&blocks, page), bytes, "page {page}");
    }
}

#[test]
fn a_vcpu_that_needs_a_poisoned_page_leaves_the_guest_with_an_error() {
    let source = Source::new(PAGES).on_load(|run, _| {
        let is_bad = (run.first.0..run.first.0 + run.count).contains(&77);
        if is_bad { Err("damaged".into()) } else { Ok(()) }
    });
    note_bus_errors();
    let blocks = kit::anonymous(PAGES);
    let Some((_vm, vcpus, _code)) = machine(&blocks) else { return };
    let Some(userfault) = kit::open(Pager::NEEDS) else { return };
    let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
    let pager = Pager::start(armed, Arc::new(source), PagerOptions::new()).expect("started");
    let runs = (0..).zip(vcpus).map(|(half, vcpu)| thread::spawn(move || run(vcpu, half)));
    let sums: Vec<_> =
        runs.collect::<Vec<_>>().into_iter().map(|run| run.join().expect("no panic")).collect();
    assert_eq!(sums.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
    assert!(pager.finish(Some(LIMIT)).is_err());
}

/// The kernel's log and the copier protect the same pages. The log finds every write, and the copy has no byte of the time after the hold.
#[test]
fn vcpus_are_copied_as_they_were_at_the_hold_while_the_kernel_logs_their_writes() {
    let blocks = kit::anonymous(PAGES);
    (0..PAGES).for_each(|page| write_page(&blocks, page, page + 1));
    let Some((vm, vcpus, _code)) = machine(&blocks) else { return };
    let region = ram_slot(kit::page_of(&blocks, 0).as_ptr().addr() as u64);
    // SAFETY: this is the slot of the machine's memory, which nobody else sets.
    let mut log = unsafe { KvmDirtyLog::start(&vm, vec![region], &blocks) }.expect("a log");
    let vcpus: Vec<_> = vcpus.into_iter().map(std::sync::Mutex::new).collect();
    let run_all = |byte| {
        thread::scope(|threads| {
            for (half, vcpu) in (0..).zip(&vcpus) {
                threads.spawn(move || write(&mut vcpu.lock().expect("whole"), half, byte).expect("no error"));
            }
        });
    };
    let logged = PageBitmap::new(PAGES);
    let mut found = |when: &str| {
        log.take(BLOCK, &mut DirtyPages::new(&logged)).expect("taken");
        let missed = (0..PAGES).find(|page| !logged.contains(guest_ram::PageIndex(*page)));
        assert_eq!(missed, None, "{when}: the log has missed a write");
        (0..PAGES).for_each(|page| {
            logged.clear(guest_ram::PageIndex(page));
        });
    };
    let kept = Arc::new(Kept::default());
    let options = options().threads(1).bytes(16 << 12);
    let prepared = thread::scope(|threads| {
        // They write while everything is being protected.
        threads.spawn(|| run_all(1));
        prepare(&blocks, kept.clone(), options)
    });
    let Some(prepared) = prepared else { return };
    run_all(2);
    found("before the hold");
    let copier = prepared.hold().expect("held");
    run_all(3);
    run_all(4);
    let stats = copier.finish(Some(LIMIT)).expect("complete");
    found("after the hold");
    let kept = kept.pages();
    assert_eq!(kept.len() as u64, PAGES, "{stats:?}");
    for page in 0..PAGES {
        let mut bytes: Vec<u8> = (page + 1).to_be_bytes().repeat(512);
        bytes[4..8].fill(2);
        assert_eq!(kept[&page], bytes, "page {page} is not as it was at the hold");
        bytes[4..8].fill(4);
        assert_eq!(kit::read_page(&blocks, page)[..], bytes, "page {page} has lost a write");
    }
}
