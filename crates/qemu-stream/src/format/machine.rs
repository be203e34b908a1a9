//! The machine type, and which bytes of the stream depend on its version.
//!
//! Several details of the stream follow the machine type, not the version of the program that writes: a QEMU 10.0 that
//! runs `pc-q35-7.2` writes what 7.2 wrote.
//!
//! Only machine families that QEMU numbers by its own versions have a version here. A number in another name belongs to
//! its monitor: "my-vmm-2.1" is not a machine of QEMU 2.1, and is treated as a type without a version.

use std::fmt;

use super::{SyncMode, limits};

/// The name of a machine type, such as `pc-q35-8.0`: 1 to 255 bytes of printable ASCII.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MachineType(String);

/// A name that is not valid for a machine type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("machine type: expected 1 to 255 printable bytes, found \"{}\"", .0.escape_default())]
pub struct InvalidMachineType(String);

impl From<InvalidMachineType> for multifd::Error {
    fn from(error: InvalidMachineType) -> Self {
        Self::other("cannot name the machine", error)
    }
}

impl MachineType {
    /// Creates a machine type with this name.
    ///
    /// # Errors
    /// If it is empty, longer than 255 bytes or not printable ASCII.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidMachineType> {
        let name = name.into();
        let valid = (1..=limits::MACHINE_NAME as usize).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic());
        if !valid {
            return Err(InvalidMachineType(name));
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The QEMU version of the type: the number after `pc-q35-`, `pc-i440fx-`, `virt-`, `pseries-` or
    /// `s390-ccw-virtio-`. `None` for a type without a version (`microvm`), with a vendor's version
    /// (`pc-q35-rhel9.2.0`), or of another monitor, regardless of a number in its name (`my-vmm-8.0`).
    ///
    /// **Warning:** the version determines several bytes of the stream. A monitor that is not QEMU must use a name
    /// outside these families. With a name of one of them, it writes what that version of QEMU writes.
    pub fn version(&self) -> Option<MachineVersion> {
        let numbered = FAMILIES.iter().find_map(|family| self.0.strip_prefix(family)?.strip_prefix('-'));
        // A variant may follow the number: `pseries-2.12-sxxm`.
        MachineVersion::parse(numbered?.split('-').next()?)
    }

    /// How the ends of dirty rounds are marked if multifd is on: per section up to 8.0, per round later.
    pub fn sync_mode(&self) -> Option<SyncMode> {
        let newer = self.version()? > MachineVersion::new(8, 0);
        Some(if newer { SyncMode::Round } else { SyncMode::Legacy })
    }

    /// Whether the stream has a configuration and its sections have footers: from 2.4 on.
    pub fn has_footers(&self) -> bool {
        self.version().is_none_or(|version| version > MachineVersion::new(2, 3))
    }

    /// Whether SWITCHOVER_START is sent before the END sections: from 10.0 on.
    pub fn has_switchover_start(&self) -> bool {
        self.version().is_some_and(|version| version >= MachineVersion::new(10, 0))
    }

    /// Whether packets of channels are numbered without gaps: from 9.0 on. The source of an older type may do so, too.
    pub fn has_exact_packet_nums(&self) -> bool {
        self.version().is_some_and(|version| version >= MachineVersion::new(9, 0))
    }

    /// Whether zero pages go over the main stream as ZERO records by default: up to 8.2.
    pub fn has_zero_pages_on_main(&self) -> Option<bool> {
        Some(self.version()? <= MachineVersion::new(8, 2))
    }
}

impl fmt::Display for MachineType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The version in a machine type's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineVersion {
    /// The 8 of `8.2`.
    pub major: u16,
    /// The 2 of `8.2`.
    pub minor: u16,
}

impl MachineVersion {
    /// The version `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    /// Parses `8.0`, or a version with a third number as in `pc-q35-4.0.1`; the third number has no effect.
    fn parse(part: &str) -> Option<Self> {
        let number = |digits: &str| -> Option<u16> {
            digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
        };
        let mut numbers = part.split('.');
        let version = Self::new(number(numbers.next()?)?, number(numbers.next()?)?);
        match numbers.next() {
            None => Some(version),
            Some(third) => number(third).filter(|_| numbers.next().is_none()).map(|_| version),
        }
    }
}

impl fmt::Display for MachineVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The families that QEMU numbers by its versions, according to `-machine help` of 7.2 and 10.0 for all architectures.
const FAMILIES: [&str; 5] = ["pc-q35", "pc-i440fx", "virt", "pseries", "s390-ccw-virtio"];

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(name: &str) -> MachineType {
        MachineType::new(name).unwrap()
    }

    #[test]
    fn the_version_is_found_in_the_name() {
        for (name, version) in [
            ("pc-q35-8.0", Some((8, 0))),
            ("pc-i440fx-2.3", Some((2, 3))),
            ("pc-q35-4.0.1", Some((4, 0))),
            ("virt-9.1", Some((9, 1))),
            ("pseries-2.12-sxxm", Some((2, 12))),
            ("s390-ccw-virtio-10.0", Some((10, 0))),
            ("microvm", None),
            ("pc-q35", None),
            ("pc-q35-rhel9.2.0", None),
            ("pc-q35-jammy", None),
            ("virt-9.1.2.3", None),
            ("virt-+9.1", None),
            ("virt-99999.1", None),
            ("virt-", None),
            ("virt", None),
        ] {
            let expected = version.map(|(major, minor)| MachineVersion::new(major, minor));
            assert_eq!(machine(name).version(), expected, "{name}");
        }
    }

    /// Regression: "my-vmm-2.1" was refused as a machine of QEMU 2.1, and "my-vmm-8.0" was written with its sync mode.
    #[test]
    fn number_in_a_name_of_none_of_qemus_families_decides_nothing() {
        for name in
            ["my-vmm-2.1", "my-vmm-8.0", "my-vmm-10.0", "8.0", "-8.0", "pc-8.0", "my-virt-8.0", "virt-my-8.0"]
        {
            let machine = machine(name);
            assert_eq!(machine.version(), None, "{name}");
            assert_eq!((machine.sync_mode(), machine.has_zero_pages_on_main()), (None, None), "{name}");
            assert!(machine.has_footers() && !machine.has_switchover_start(), "{name}");
        }
    }

    #[test]
    fn what_follows_from_the_version_changes_where_it_should() {
        assert_eq!(machine("pc-q35-8.0").sync_mode(), Some(SyncMode::Legacy));
        assert_eq!(machine("pc-q35-8.1").sync_mode(), Some(SyncMode::Round));
        assert_eq!(machine("microvm").sync_mode(), None);
        assert!(!machine("pc-i440fx-2.3").has_footers());
        assert!(machine("pc-i440fx-2.4").has_footers());
        assert!(!machine("pc-q35-9.2").has_switchover_start());
        assert!(machine("pc-q35-10.0").has_switchover_start());
        assert_eq!(machine("pc-q35-8.2").has_zero_pages_on_main(), Some(true));
        assert_eq!(machine("pc-q35-9.0").has_zero_pages_on_main(), Some(false));
    }

    #[test]
    fn a_name_that_is_empty_long_or_not_printable_is_no_machine_type() {
        assert!(MachineType::new("").is_err());
        assert!(MachineType::new("x".repeat(255)).is_ok());
        assert!(MachineType::new("x".repeat(256)).is_err());
        assert!(MachineType::new("pc\x1b").is_err());
    }
}
