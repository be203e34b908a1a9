//! The registers of the processors, from the fields of their devices, as notes.
//!
//! The notes are those of QEMU's own dumps (`dump-guest-memory`), byte for byte: a test compares them.

use qemu_stream::state::{Array, DeviceState, Devices, Fields, Value};

use super::note::{Architecture, Bytes, Notes};

/// Adds the registers of all processors that are known. Returns the number of processors.
pub(super) fn add(devices: &Devices<'_>, architecture: Architecture, notes: &mut Notes) -> u32 {
    let processors: Vec<_> =
        devices.iter().filter(|device| device.name().as_bytes() == PROCESSOR.as_bytes()).collect();
    let known = match architecture {
        Architecture::X86 => {
            let registers: Vec<_> = processors.iter().filter_map(X86::of).collect();
            for (number, registers) in (1..).zip(&registers) {
                notes.add(CORE, PRSTATUS, &registers.status(number));
            }
            for registers in &registers {
                notes.add(QEMU, 0, &registers.qemu());
            }
            registers.len()
        }
        Architecture::Aarch64 => {
            let all: Vec<_> = processors.iter().filter_map(aarch64).collect();
            for (number, status) in (1..).zip(&all) {
                notes.add(CORE, PRSTATUS, &process_status(architecture, number, status));
            }
            all.len()
        }
        Architecture::S390 | Architecture::Ppc64 | Architecture::Ppc64Le => {
            let registers = if architecture == Architecture::S390 { s390 } else { ppc64 };
            let all: Vec<_> = processors.iter().filter_map(registers).collect();
            for (number, status) in (1..).zip(&all) {
                notes.add(CORE, PRSTATUS, &process_status(architecture, number, status));
            }
            all.len()
        }
        Architecture::Riscv64 => 0,
    };
    u32::try_from(known).unwrap_or(u32::MAX)
}

/// The status of a process with this number, in which the registers are.
fn process_status(architecture: Architecture, number: u32, registers: &[u64]) -> Vec<u8> {
    let mut status = Bytes::new(architecture.is_little());
    status.zeros_to(PROCESS_AT);
    status.u32(number);
    status.zeros_to(REGISTERS_AT);
    registers.iter().for_each(|register| status.u64(*register));
    // Whether there are floating-point registers, and its alignment.
    status.u64(0);
    status.into()
}

/// x0 to x30, the stack pointer, the program counter, the state.
fn aarch64(device: &DeviceState<'_>) -> Option<Vec<u64>> {
    let general = numbers(device, "env.xregs")?;
    let mut registers: Vec<u64> = (0..32).map(|number| general.number(number)).collect::<Option<_>>()?;
    registers.push(number(device, "env.pc")?);
    // The state is a field of its own type, whose bytes are one number.
    registers.push(number(device, "cpsr")?);
    Some(registers)
}

/// The status word, r0 to r15, two of a0 to a15 in each number, the first register of a system call.
fn s390(device: &DeviceState<'_>) -> Option<Vec<u64>> {
    let mut registers = vec![number(device, "env.psw.mask")?, number(device, "env.psw.addr")?];
    let (general, access) = (numbers(device, "env.regs")?, numbers(device, "env.aregs")?);
    for at in 0..16 {
        registers.push(general.number(at)?);
    }
    for at in (0..16).step_by(2) {
        registers.push(access.number(at)? << 32 | access.number(at + 1)?);
    }
    registers.push(0);
    Some(registers)
}

/// r0 to r31, nip, msr, the first register of a system call, ctr, link, xer, ccr, and those that only Linux knows.
fn ppc64(device: &DeviceState<'_>) -> Option<Vec<u64>> {
    let (general, special) = (numbers(device, "env.gpr")?, numbers(device, "env.spr")?);
    let mut registers: Vec<u64> = (0..32).map(|at| general.number(at)).collect::<Option<_>>()?;
    registers.extend([number(device, "env.nip")?, number(device, "env.msr")?, 0]);
    registers.extend([special.number(CTR)?, special.number(LINK)?, special.number(XER)?]);
    let conditions = numbers(device, "env.crf")?;
    let condition = conditions.iter().try_fold(0, |all, field| Some(all << 4 | field.as_number()? & 0xf))?;
    registers.push(condition);
    registers.resize(PPC64_REGISTERS, 0);
    Some(registers)
}

/// Whether the numbers of a POWER processor begin with the low byte, which its kernel chooses.
pub(super) fn is_little(devices: &Devices<'_>) -> bool {
    let first = devices.find(PROCESSOR, 0);
    first.and_then(|device| number(&device, "env.msr")).is_none_or(|state| state & 1 == 1)
}

/// The registers of an x86 processor.
struct X86 {
    /// In the order of their numbers: ax, cx, dx, bx, sp, bp, si, di, r8 to r15.
    general: [u64; 16],
    instruction: u64,
    flags: u64,
    /// es, cs, ss, ds, fs, gs.
    segments: [Segment; 6],
    /// ldt, tr, gdt, idt.
    tables: [Segment; 4],
    control: [u64; 5],
    kernel_gs: u64,
}

#[derive(Clone, Copy, Default)]
struct Segment {
    selector: u32,
    base: u64,
    limit: u32,
    flags: u32,
}

impl X86 {
    fn of(device: &DeviceState<'_>) -> Option<Self> {
        let general = numbers(device, "env.regs")?;
        let general: Vec<u64> = (0..16).map(|number| general.number(number)).collect::<Option<_>>()?;
        let segments = numbers(device, "env.segs")?;
        let segment = |number| match segments.get(number)? {
            Value::Struct(fields) => Segment::of(fields),
            _ => None,
        };
        let segments: Vec<Segment> = (0..6).map(segment).collect::<Option<_>>()?;
        let table = |name| match device.value(name)? {
            Value::Struct(fields) => Segment::of(fields),
            _ => None,
        };
        let named = |name| number(device, name);
        Some(Self {
            general: general.try_into().ok()?,
            instruction: named("env.eip")?,
            flags: named("env.eflags")?,
            segments: segments.try_into().ok()?,
            tables: [table("env.ldt")?, table("env.tr")?, table("env.gdt")?, table("env.idt")?],
            // There is no CR1.
            control: [named("env.cr[0]")?, 0, named("env.cr[2]")?, named("env.cr[3]")?, named("env.cr[4]")?],
            // Not in the state of processors of 32 bits.
            kernel_gs: named("env.kernelgsbase").unwrap_or(0),
        })
    }

    /// NT_PRSTATUS: the registers in the order of `struct user_regs_struct`.
    fn status(&self, number: u32) -> Vec<u8> {
        let [ax, cx, dx, bx, sp, bp, si, di, r8, r9, r10, r11, r12, r13, r14, r15] = self.general;
        let [es, cs, ss, ds, fs, gs] = self.segments;
        let selector = |segment: Segment| u64::from(segment.selector);
        process_status(
            Architecture::X86,
            number,
            &[
                r15,
                r14,
                r13,
                r12,
                bp,
                bx,
                r11,
                r10,
                r9,
                r8,
                ax,
                cx,
                dx,
                si,
                di,
                0, // no system call
                self.instruction,
                selector(cs),
                self.flags,
                sp,
                selector(ss),
                fs.base,
                gs.base,
                selector(ds),
                selector(es),
                selector(fs),
                selector(gs),
            ],
        )
    }

    /// QEMU's own note, from which `crash` takes the control registers.
    fn qemu(&self) -> Vec<u8> {
        let [ax, cx, dx, bx, sp, bp, si, di, rest @ ..] = self.general;
        let [es, cs, ss, ds, fs, gs] = self.segments;
        let mut note = Bytes::new(true);
        note.u32(1);
        note.u32(QEMU_LENGTH);
        [ax, bx, cx, dx, si, di, sp, bp].into_iter().for_each(|register| note.u64(register));
        rest.into_iter().for_each(|register| note.u64(register));
        note.u64(self.instruction);
        note.u64(self.flags);
        for segment in [cs, ds, es, fs, gs, ss].into_iter().chain(self.tables) {
            note.u32(segment.selector);
            note.u32(segment.limit);
            note.u32(segment.flags);
            note.u32(0);
            note.u64(segment.base);
        }
        self.control.into_iter().for_each(|register| note.u64(register));
        note.u64(self.kernel_gs);
        note.into()
    }
}

impl Segment {
    fn of(fields: Fields<'_>) -> Option<Self> {
        let mut segment = Self::default();
        for field in fields {
            let number = field.value().as_number()?;
            let small = || u32::try_from(number).ok();
            match field.name() {
                "selector" => segment.selector = small()?,
                "base" => segment.base = number,
                "limit" => segment.limit = small()?,
                "flags" => segment.flags = small()?,
                _ => {}
            }
        }
        Some(segment)
    }
}

fn numbers<'a>(device: &DeviceState<'a>, name: &str) -> Option<Array<'a>> {
    match device.value(name)? {
        Value::Array(array) => Some(array),
        _ => None,
    }
}

fn number(device: &DeviceState<'_>, name: &str) -> Option<u64> {
    match device.value(name)? {
        Value::Bytes(bytes) if (1..=8).contains(&bytes.len()) => {
            Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
        }
        value => value.as_number(),
    }
}

/// Numbers of special registers of POWER.
const XER: usize = 1;
const LINK: usize = 8;
const CTR: usize = 9;
/// The numbers in its part of a process status.
const PPC64_REGISTERS: usize = 48;
/// The name of a processor among the devices.
const PROCESSOR: &str = "cpu";
const CORE: &str = "CORE";
const QEMU: &str = "QEMU";
const PRSTATUS: u32 = 1;
/// The length of QEMU's note for x86.
const QEMU_LENGTH: u32 = 440;
/// Where a process status has the number of the process.
const PROCESS_AT: usize = 32;
/// Where it has the registers.
const REGISTERS_AT: usize = 112;
