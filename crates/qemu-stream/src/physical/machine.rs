//! Where the machines of QEMU have their RAM.
//!
//! Observed with `info mtree -f` of QEMU 7.2 and 10.0 (`docs/develop/stream-format.md`, *Guest-physical addresses*):
//!
//! ```text
//! PC           0 ─ low ─┄ 4 GiB ─ the rest     low: from the CMOS, or by the machine type and the size
//! virt, Arm    0x4000_0000 ─ all
//! virt, RISC-V 0x8000_0000 ─ all
//! s390, pseries 0 ─ all
//! ```

use multifd::ram::{BlockIndex, BlockOffset};

use super::range::{BadPlace, PhysicalAddress, PhysicalRange};
use crate::{
    format::{BlockEntry, MachineType, MachineVersion},
    mapped_ram::StoredMachine,
    state::{Devices, Value},
};

/// The ranges of blocks that the caller has not placed.
pub(super) fn ranges(
    machine: &StoredMachine,
    is_placed: &dyn Fn(BlockIndex) -> bool,
) -> Result<Vec<PhysicalRange>, BadPlace> {
    let list = machine.blocks();
    let candidates: Vec<_> =
        list.iter().filter(|(index, entry)| may_be_ram(entry) && !is_placed(*index)).collect();
    if list.entries().iter().any(|entry| entry.address.is_some()) {
        return Ok(with_addresses(&candidates));
    }
    let name = machine.configuration().map(|of| of.machine.to_string());
    // Machine types up to 2.3 send no configuration; their main block shows what they are.
    let name = name.unwrap_or_else(|| "unknown".into());
    let kind = Kind::of(&name, &candidates).ok_or_else(|| BadPlace::Machine(name.clone()))?;
    let cmos = match kind {
        Kind::Pc { .. } => Cmos::of(machine),
        Kind::Flat(_) => None,
    };
    let (index, entry) = main_block(&candidates, cmos.as_ref(), &name)?;
    let range = |start, offset, length| PhysicalRange {
        start: PhysicalAddress(start),
        length,
        block: index,
        offset: BlockOffset(offset),
    };
    let total = entry.used_length;
    match kind {
        Kind::Flat(start) => Ok(vec![range(start, 0, total)]),
        Kind::Pc { limit, low } => {
            let low = match cmos.filter(|cmos| cmos.total() == Some(total)) {
                Some(cmos) => cmos.low,
                None if total >= limit => low,
                None => total,
            };
            let low = low.min(total);
            if total - low > MOST_ABOVE {
                return Err(BadPlace::Huge(total));
            }
            let mut ranges = vec![range(0, 0, low)];
            if total > low {
                ranges.push(range(FOUR_GIB, low, total - low));
            }
            Ok(ranges)
        }
    }
}

/// How a machine places its RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// RAM is in one piece at this address.
    Flat(u64),
    /// RAM of at least `limit` bytes is split: `low` of it is below 4 GiB.
    Pc { limit: u64, low: u64 },
}

impl Kind {
    fn of(machine: &str, blocks: &[(BlockIndex, &BlockEntry)]) -> Option<Self> {
        let has = |name: &str| blocks.iter().any(|(_, entry)| entry.name.as_bytes() == name.as_bytes());
        let is = |name: &str| {
            machine == name || machine.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'))
        };
        let i440fx = || {
            // Older ones do not round to GiB.
            let version = MachineType::new(machine).ok().and_then(|machine| machine.version());
            let rounds = version.is_none_or(|version| version >= MachineVersion::new(2, 0));
            Self::Pc { limit: 0xe000_0000, low: if rounds { 0xc000_0000 } else { 0xe000_0000 } }
        };
        if is("pc-q35") || is("q35") {
            Some(Self::Pc { limit: 0xb000_0000, low: 0x8000_0000 })
        } else if is("microvm") {
            Some(Self::Pc { limit: 0xe000_0000, low: 0xc000_0000 })
        } else if is("pc-i440fx") || is("pc") || has("pc.ram") {
            Some(i440fx())
        } else if is("s390-ccw-virtio") || is("pseries") {
            Some(Self::Flat(0))
        } else if has("mach-virt.ram") {
            Some(Self::Flat(0x4000_0000))
        } else if has("riscv_virt_board.ram") {
            Some(Self::Flat(0x8000_0000))
        } else {
            None
        }
    }
}

/// Whether a block can be RAM: it is not that of a device, nor firmware.
pub(super) fn may_be_ram(entry: &BlockEntry) -> bool {
    let name = entry.name.as_bytes();
    let ends = |end: &str| name.ends_with(end.as_bytes());
    let begins = |begin: &str| name.starts_with(begin.as_bytes());
    let is_device = name.contains(&b'/') || begins("vga.") || begins("isa-") || begins("audio");
    let is_firmware = ends(".bios") || ends(".rom") || ends(".mrom") || ends(".flash0") || ends(".flash1");
    !is_device && !is_firmware
}

/// The block of the machine's RAM: by its name, or the only one that it can be.
fn main_block<'a>(
    candidates: &[(BlockIndex, &'a BlockEntry)],
    cmos: Option<&Cmos>,
    machine: &str,
) -> Result<(BlockIndex, &'a BlockEntry), BadPlace> {
    let named = |(_, entry): &&(BlockIndex, &BlockEntry)| {
        MAIN.iter().any(|name| entry.name.as_bytes() == name.as_bytes())
    };
    if let Some(found) = candidates.iter().find(named) {
        return Ok(*found);
    }
    let fits = |(_, entry): &&(BlockIndex, &BlockEntry)| {
        cmos.is_none_or(|cmos| cmos.total() == Some(entry.used_length))
    };
    let mut fitting = candidates.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(found), None) => Ok(*found),
        // The list is sorted by length, so its order means nothing.
        _ if candidates.len() > 1 => {
            let names: Vec<_> = candidates.iter().map(|(_, entry)| entry.name.to_string()).collect();
            Err(BadPlace::Order(names.join(", ")))
        }
        _ => Err(BadPlace::NoRam { machine: machine.to_owned() }),
    }
}

/// Blocks that were sent with an address. A block at address 0 may have none; only RAM begins there.
fn with_addresses(candidates: &[(BlockIndex, &BlockEntry)]) -> Vec<PhysicalRange> {
    let ranges = candidates.iter().filter_map(|(index, entry)| {
        Some(PhysicalRange {
            start: PhysicalAddress(entry.address?),
            length: entry.used_length,
            block: *index,
            offset: BlockOffset(0),
        })
    });
    ranges.collect()
}

/// The sizes of RAM that firmware finds in the CMOS of a PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cmos {
    low: u64,
    high: u64,
}

impl Cmos {
    fn of(machine: &StoredMachine) -> Option<Self> {
        let devices = Devices::of(machine.devices()).ok()?;
        let device = devices.find("mc146818rtc", 0)?;
        let Value::Bytes(bytes) = device.value("cmos_data")? else { return None };
        Self::parse(bytes)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize, count: usize| {
            let bytes = bytes.get(at..at + count)?;
            Some(bytes.iter().rev().fold(0, |number: u64, byte| number << 8 | u64::from(*byte)))
        };
        let above_16_mib = number(0x34, 2)?;
        let low = if above_16_mib > 0 {
            (16 << 20) + (above_16_mib << 16)
        } else {
            (1 << 20) + (number(0x30, 2)? << 10)
        };
        Some(Self { low, high: number(0x5b, 3)? << 16 })
    }

    fn total(&self) -> Option<u64> {
        self.low.checked_add(self.high)
    }
}

/// The names that QEMU gives to the block of RAM.
const MAIN: [&str; 6] =
    ["pc.ram", "microvm.ram", "mach-virt.ram", "riscv_virt_board.ram", "s390.ram", "ppc_spapr.ram"];
const FOUR_GIB: u64 = 1 << 32;
/// RAM above 4 GiB that ends below the range that some hosts reserve, just below 1 TiB.
const MOST_ABOVE: u64 = 0xfd_0000_0000 - FOUR_GIB;

#[cfg(test)]
mod tests {
    use multifd::ram::BlockName;

    use super::*;

    #[test]
    fn cmos_has_the_sizes_of_a_machine_with_max_ram_below_4g() {
        let mut bytes = [0; 128];
        // QEMU 10.0, q35, 4 GiB, max-ram-below-4g=1G.
        bytes[0x30..0x36].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0x3f]);
        bytes[0x5b..0x5e].copy_from_slice(&[0, 0xc0, 0]);
        assert_eq!(Cmos::parse(&bytes), Some(Cmos { low: 1 << 30, high: 3 << 30 }));
        // 8 MiB.
        let mut small = [0; 128];
        small[0x30..0x32].copy_from_slice(&[0, 0x1c]);
        assert_eq!(Cmos::parse(&small), Some(Cmos { low: 8 << 20, high: 0 }));
        assert_eq!(Cmos::parse(&bytes[..0x40]), None);
    }

    #[test]
    fn only_ram_is_ram() {
        let is_ram = |name: &str| may_be_ram(&BlockEntry::new(BlockName::new(name).expect("a name"), 4096));
        for name in ["pc.ram", "mem0", "ram-node0"] {
            assert!(is_ram(name), "{name}");
        }
        for name in ["pc.bios", "pc.rom", "/rom@etc/acpi/tables", "0000:00:02.0/vga.vram", "virt.flash0"] {
            assert!(!is_ram(name), "{name}");
        }
    }
}
