//! ELF notes, and numbers in the order of a processor.

use std::ops::Range;

/// The processors whose files can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    X86,
    Aarch64,
    Riscv64,
    S390,
    /// POWER with numbers that begin with the high byte.
    Ppc64,
    Ppc64Le,
}

impl Architecture {
    /// That of a machine type. `has_block` says whether the machine has a block with this name.
    pub(super) fn of(machine: &str, has_block: impl Fn(&str) -> bool) -> Option<Self> {
        let is = |name: &str| {
            machine == name || machine.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'))
        };
        if ["pc-q35", "q35", "pc-i440fx", "pc", "microvm"].into_iter().any(is) || has_block("pc.ram") {
            Some(Self::X86)
        } else if is("s390-ccw-virtio") {
            Some(Self::S390)
        } else if is("pseries") {
            // Kernels for POWER begin with the low byte today.
            Some(Self::Ppc64Le)
        } else if has_block("mach-virt.ram") {
            Some(Self::Aarch64)
        } else if has_block("riscv_virt_board.ram") {
            Some(Self::Riscv64)
        } else {
            None
        }
    }

    /// Its number in the head of an ELF file.
    pub(super) fn elf(self) -> u16 {
        match self {
            Self::X86 => 62,
            Self::Aarch64 => 183,
            Self::Riscv64 => 243,
            Self::S390 => 22,
            Self::Ppc64 | Self::Ppc64Le => 21,
        }
    }

    /// The name that its kernel gives to it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Riscv64 => "riscv64",
            Self::S390 => "s390x",
            Self::Ppc64 => "ppc64",
            Self::Ppc64Le => "ppc64le",
        }
    }

    /// Whether its numbers begin with the low byte.
    pub(super) fn is_little(self) -> bool {
        !matches!(self, Self::S390 | Self::Ppc64)
    }
}

/// Bytes that are built from numbers.
#[derive(Default)]
pub(super) struct Bytes {
    bytes: Vec<u8>,
    little: bool,
}

impl Bytes {
    pub(super) fn new(little: bool) -> Self {
        Self { bytes: Vec::new(), little }
    }

    fn put<const N: usize>(&mut self, mut big: [u8; N]) {
        if self.little {
            big.reverse();
        }
        self.bytes.extend(big);
    }

    pub(super) fn u16(&mut self, number: u16) {
        self.put(number.to_be_bytes());
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.put(number.to_be_bytes());
    }

    pub(super) fn u64(&mut self, number: u64) {
        self.put(number.to_be_bytes());
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Zeros up to this length.
    pub(super) fn zeros_to(&mut self, length: usize) {
        self.bytes.resize(self.bytes.len().max(length), 0);
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }
}

impl From<Bytes> for Vec<u8> {
    fn from(bytes: Bytes) -> Self {
        bytes.bytes
    }
}

/// The contents of a segment of notes.
pub(super) struct Notes(Bytes);

impl Notes {
    pub(super) fn new(architecture: Architecture) -> Self {
        Self(Bytes::new(architecture.is_little()))
    }

    /// Appends a note. Returns where its contents are.
    pub(super) fn add(&mut self, name: &str, kind: u32, contents: &[u8]) -> Range<u64> {
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        self.0.u32(length(name.len() + 1));
        self.0.u32(length(contents.len()));
        self.0.u32(kind);
        self.0.raw(name.as_bytes());
        self.0.raw(&[0]);
        self.0.zeros_to(self.0.len().next_multiple_of(ALIGNMENT));
        let start = self.0.len() as u64;
        self.0.raw(contents);
        self.0.zeros_to(self.0.len().next_multiple_of(ALIGNMENT));
        start..start + contents.len() as u64
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0.into()
    }
}

const ALIGNMENT: usize = 4;
