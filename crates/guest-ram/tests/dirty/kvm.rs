//! The kernel's logs of the writes of two vCPUs.
//!
//! UNSAFETY: memory slots are set to mappings that the blocks keep until the machine is dropped.
#![expect(unsafe_code, reason = "a virtual machine's memory")]

use std::{
    io,
    sync::{Arc, Mutex},
    thread,
};

use guest_ram::{
    BlockIndex, DirtyBitmaps, DirtyLog, DirtyPages, KvmDirtyLog, KvmDirtyRings, KvmProtect, KvmRingError,
    Mapping, MergedLog, PageBitmap, PageIndex, PageSize, RamBlocks,
};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::{Forgetful, MILLION, follow, value, word};
use crate::kit;

/// Writes ebx to the first word of edx pages from edi on, then exits with an OUT.
const PROGRAM: [u8; 17] = [
    0x89, 0x1f, // mov [edi], ebx
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
    0x4a, // dec edx
    0x75, 0xf5, // jnz
    0xe6, 0x10, // out 0x10, al
    0xf4, 0xf4, 0xf4, 0xf4, // hlt
];

/// Guest-physical addresses in pages: the program, and the pages that the vCPUs write.
const CODE: u64 = 0xc000_0000;
const AREAS: [(u64, BlockIndex, u64, u64); 3] = [
    (0, BlockIndex(0), 0, 2048),
    (0x4000_0000, BlockIndex(0), 2048, 2000),
    (0x8000_0000, BlockIndex(1), 0, 101),
];

struct Machine {
    vcpus: Vec<Mutex<VcpuFd>>,
    rings: Option<KvmDirtyRings>,
    slots: Vec<kvm_userspace_memory_region>,
    vm: VmFd,
    /// Pages that a vCPU writes before it leaves the guest.
    turn: u64,
    blocks: Arc<RamBlocks>,
    _code: Mapping,
}

/// A machine whose blocks lie in three slots; with rings of `ring` entries, if given. `None` if there is no KVM.
fn machine(ring: Option<u32>) -> Option<Machine> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            multifd_testkit::skip(&format!("/dev/kvm cannot be opened: {error}"));
            return None;
        }
    };
    let vm = kvm.create_vm().expect("a virtual machine");
    vm.set_tss_address(0xfffb_d000).expect("a place for the task state");
    let size = match ring.map(|entries| KvmDirtyRings::enable(&vm, entries)).transpose() {
        Ok(size) => size,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            multifd_testkit::lacks("the kernel has no dirty rings");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let blocks = kit::fresh(PageSize::KIB_4, &[("low", 4048 << 12), ("high", 101 << 12)]);
    let code = Mapping::anonymous(4096).expect("memory");
    code.slice(0, PROGRAM.len()).expect("inside").copy_from(&PROGRAM);
    let address = |block: BlockIndex, page| {
        let block = blocks.block(block).expect("there");
        block.slice(PageIndex(page), 1).expect("there").as_ptr().addr() as u64
    };
    let region = |slot, guest_phys_addr, memory_size, userspace_addr| kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr,
        memory_size,
        userspace_addr,
    };
    let slots: Vec<_> = (0..)
        .zip(AREAS)
        .map(|(slot, (at, block, first, pages))| region(slot, at, pages << 12, address(block, first)))
        .collect();
    let code_at = code.slice(0, 1).expect("inside").as_ptr().addr() as u64;
    for region in slots.iter().copied().chain([region(3, CODE, 4096, code_at)]) {
        // SAFETY: block and code are mapped that long and live as long as the machine.
        unsafe { vm.set_user_memory_region(region) }.expect("a slot");
    }
    let vcpus: Vec<VcpuFd> = (0..2).map(|id| vcpu(&vm, id)).collect();
    let rings = size.map(|size| KvmDirtyRings::new(&vm, &vcpus, size).expect("rings"));
    Some(Machine {
        vcpus: vcpus.into_iter().map(Mutex::new).collect(),
        rings,
        slots,
        vm,
        turn: u64::MAX,
        blocks,
        _code: code,
    })
}

/// A vCPU in protected mode, without paging.
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

impl Machine {
    /// Makes the vCPUs write every page.
    fn write(&self, round: u64) {
        thread::scope(|scope| {
            scope.spawn(|| self.fill(0, &AREAS[..1], round));
            scope.spawn(|| self.fill(1, &AREAS[1..], round));
        });
    }

    fn fill(&self, vcpu: usize, areas: &[(u64, BlockIndex, u64, u64)], round: u64) {
        let mut vcpu = self.vcpus[vcpu].lock().expect("whole");
        for (at, _, _, pages) in areas {
            let rbx = value(round);
            let mut left = *pages;
            while left > 0 {
                let rdx = left.min(self.turn);
                let rdi = *at + ((*pages - left) << 12);
                let regs = kvm_regs { rip: CODE, rflags: 2, rbx, rdi, rdx, ..Default::default() };
                vcpu.set_regs(&regs).expect("registers");
                self.until_out(&mut vcpu);
                left -= rdx;
            }
        }
    }

    fn until_out(&self, vcpu: &mut VcpuFd) {
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => break,
                Ok(VcpuExit::Unsupported(KvmDirtyRings::RING_FULL)) => {
                    if self.rings.as_ref().expect("rings").drain().is_err() {
                        return;
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("found {other:?}"),
            }
        }
    }

    fn log(&self, protect: KvmProtect) -> Option<KvmDirtyLog<'_>> {
        // SAFETY: the slots are those that were set.
        match unsafe { KvmDirtyLog::start_with(&self.vm, self.slots.clone(), &self.blocks, protect) } {
            Ok(log) => Some(log),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                multifd_testkit::lacks("the kernel has no manual protection of dirty pages");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn ring_log(&self) -> guest_ram::KvmRingLog<'_> {
        let rings = self.rings.as_ref().expect("rings");
        // SAFETY: the slots are those that were set, and the rings are this machine's.
        unsafe { rings.start(&self.vm, self.slots.clone(), &self.blocks) }.expect("a log")
    }
}

fn taken(log: &mut dyn DirtyLog, blocks: &RamBlocks) -> Vec<u64> {
    let count = |(index, block): (BlockIndex, &guest_ram::RamBlock)| {
        let into = PageBitmap::new(block.pages());
        log.take(index, &mut DirtyPages::new(&into)).expect("taken");
        into.count()
    };
    blocks.iter().map(count).collect()
}

#[test]
fn a_million_writes_of_vcpus_are_found_with_automatic_protection() {
    let Some(machine) = machine(None) else { return };
    let Some(mut log) = machine.log(KvmProtect::Automatic) else { return };
    follow(&mut log, &machine.blocks, MILLION, |round| machine.write(round)).assert_whole();
}

#[test]
fn a_million_writes_of_vcpus_are_found_with_manual_protection() {
    let Some(machine) = machine(None) else { return };
    let Some(mut log) = machine.log(KvmProtect::Manual) else { return };
    follow(&mut log, &machine.blocks, MILLION, |round| machine.write(round)).assert_whole();
}

/// The rings are far smaller than a round, so the vCPUs' threads drain them as well. The vCPUs leave the guest so often
/// that no kernel can miss a full ring.
#[test]
fn a_million_writes_of_vcpus_are_found_in_their_rings() {
    let Some(mut machine) = machine(Some(1024)) else { return };
    machine.turn = 32;
    let mut log = machine.ring_log();
    follow(&mut log, &machine.blocks, MILLION, |round| machine.write(round)).assert_whole();
}

/// Kernels that emulate the guest's instructions were observed to let a vCPU overwrite its ring.
#[test]
fn ring_that_runs_over_is_noticed_and_fails_the_take() {
    let Some(machine) = machine(Some(1024)) else { return };
    let mut log = machine.ring_log();
    for round in 0..20 {
        machine.write(round);
        let into = PageBitmap::new(4048);
        match log.take(BlockIndex(0), &mut DirtyPages::new(&into)) {
            Ok(()) => assert_eq!(into.count(), 4048, "pages are missing, and nothing tells in round {round}"),
            Err(error) => {
                assert!(matches!(ring_error(&error), KvmRingError::RanOver { rings: 2, .. }), "{error}");
                return;
            }
        }
    }
}

fn ring_error(error: &io::Error) -> KvmRingError {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<KvmRingError>());
    *inner.unwrap_or_else(|| panic!("{error}"))
}

/// Regression: its writes were in no log, because its ring could not be added.
#[test]
fn writes_of_a_vcpu_that_was_plugged_in_are_found_when_its_ring_is_added() {
    let Some(mut machine) = machine(Some(8192)) else { return };
    let mut log = machine.ring_log();
    assert_eq!(taken(&mut log, &machine.blocks), [0, 0]);
    let plugged = vcpu(&machine.vm, 7);
    let rings = machine.rings.clone().expect("rings");
    rings.add(&plugged).expect("added");
    drop(log);
    machine.vcpus.push(Mutex::new(plugged));
    let mut log = machine.ring_log();
    machine.fill(2, &AREAS[2..], 5);
    assert_eq!(taken(&mut log, &machine.blocks), [0, 101]);

    // A vCPU that has run before it is added is found as well.
    let late = vcpu(&machine.vm, 9);
    let regs = kvm_regs { rip: CODE, rflags: 2, rbx: 1, rdi: AREAS[1].0, rdx: 50, ..Default::default() };
    late.set_regs(&regs).expect("registers");
    let mut late = late;
    machine.until_out(&mut late);
    assert_eq!(taken(&mut log, &machine.blocks), [0, 0]);
    rings.add(&late).expect("added");
    assert_eq!(taken(&mut log, &machine.blocks), [50, 0]);

    let twice = rings.add(&late).expect_err("twice");
    assert_eq!(ring_error(&twice), KvmRingError::Twice { vcpu: 9 });
}

/// Regression: a ring mapped too long ended the process, and one mapped too short was read at wrong positions.
#[test]
fn ring_size_of_another_machine_is_refused() {
    let Some(machine) = machine(Some(1024)) else { return };
    for entries in [512, 2048, 65536] {
        let other = Kvm::new().and_then(|kvm| kvm.create_vm()).expect("a machine");
        let size = KvmDirtyRings::enable(&other, entries).expect("enabled");
        let vcpu = machine.vcpus[1].lock().expect("whole");
        let refused = KvmDirtyRings::new(&machine.vm, [&*vcpu], size).map(drop).expect_err("refused");
        assert_eq!(ring_error(&refused), KvmRingError::Size { vcpu: 1, entries });
        let without = Kvm::new().and_then(|kvm| kvm.create_vm()).expect("a machine");
        let vcpu = without.create_vcpu(0).expect("a vCPU");
        let refused = KvmDirtyRings::new(&without, [&vcpu], size).map(drop).expect_err("refused");
        assert_eq!(ring_error(&refused), KvmRingError::Size { vcpu: 0, entries });
    }
}

#[test]
fn one_write_lost_behind_the_kernel_is_noticed() {
    let Some(machine) = machine(None) else { return };
    let Some(log) = machine.log(KvmProtect::Automatic) else { return };
    let mut forgetful = Forgetful { log, which: 50_000.into() };
    let found = follow(&mut forgetful, &machine.blocks, 100_000, |round| machine.write(round));
    assert_eq!(found.lost, 1, "{found:?}");
}

#[test]
fn writes_of_vcpus_and_of_device_threads_are_found_in_merged_logs() {
    let Some(machine) = machine(None) else { return };
    // SAFETY: the slots are those that were set.
    let vcpus =
        unsafe { KvmDirtyLog::start(&machine.vm, machine.slots.clone(), &machine.blocks) }.expect("a log");
    let devices = DirtyBitmaps::new(&machine.blocks);
    let mut merged = MergedLog::new().with("vcpus", vcpus).with("devices", devices.reader().expect("alone"));
    // Odd rounds are a device's.
    let found = follow(&mut merged, &machine.blocks, 100_000, |round| {
        if round % 2 == 0 {
            return machine.write(round);
        }
        for (index, block) in machine.blocks.iter() {
            for page in (0..block.pages()).map(PageIndex) {
                let mut bytes = [0; 4096];
                bytes[..8].copy_from_slice(&word(round));
                block.slice(page, 1).expect("there").copy_from(&bytes);
                devices.mark(index, page);
            }
        }
    });
    assert_eq!(found.lost, 0, "{found:?}");
}

/// The kernel writes a vCPU's pages into the guest through the process's page table.
#[test]
#[cfg(feature = "pagemap")]
fn a_million_writes_of_vcpus_are_found_in_the_page_table_of_the_process() {
    let Some(machine) = machine(None) else { return };
    let mut log = match guest_ram::PagemapLog::start(machine.blocks.clone()) {
        Ok(log) => log,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            return multifd_testkit::lacks(&error.to_string());
        }
        Err(error) => panic!("{error}"),
    };
    follow(&mut log, &machine.blocks, MILLION, |round| machine.write(round)).assert_whole();
}

#[test]
fn a_log_that_was_dropped_has_switched_logging_off_and_the_next_begins_anew() {
    for ring in [None, Some(8192)] {
        let Some(machine) = machine(ring) else { return };
        let take = |expected: [u64; 2]| {
            let mut log: Box<dyn DirtyLog + '_> = match ring {
                None => Box::new(machine.log(KvmProtect::Automatic).expect("every kernel has that")),
                Some(_) => Box::new(machine.ring_log()),
            };
            assert_eq!(taken(&mut log, &machine.blocks), [0, 0], "with rings of {ring:?}");
            machine.write(0);
            assert_eq!(taken(&mut log, &machine.blocks), expected, "with rings of {ring:?}");
            let back = PageBitmap::new(101);
            back.set_run(PageIndex(7), 2);
            log.put_back(BlockIndex(1), &back);
            assert_eq!(taken(&mut log, &machine.blocks), [0, 2]);
        };
        take([4048, 101]);
        machine.write(1);
        take([4048, 101]);
        if let Some(rings) = &machine.rings {
            let _log = machine.ring_log();
            // SAFETY: as in `ring_log`.
            let second = unsafe { rings.start(&machine.vm, machine.slots.clone(), &machine.blocks) };
            assert_eq!(second.expect_err("one reader at a time").kind(), io::ErrorKind::ResourceBusy);
        }
    }
}

#[test]
fn slot_that_is_not_in_its_block_is_refused_by_number() {
    let Some(machine) = machine(None) else { return };
    let slots: [fn(&mut kvm_userspace_memory_region); 3] = [
        |slot| slot.userspace_addr += 1 << 12,
        |slot| slot.userspace_addr += 1,
        |slot| slot.memory_size = 4096 << 12,
    ];
    for spoil in slots {
        let mut slots = machine.slots.clone();
        spoil(&mut slots[1]);
        // SAFETY: the regions are those that were set.
        let refused =
            unsafe { KvmDirtyLog::start(&machine.vm, slots, &machine.blocks) }.expect_err("refused");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{refused}");
    }
}
