//! A guest that detects when its memory differs from what it wrote.
//!
//! ```text
//! 1 MiB   the program, its state, its stack
//! 4 MiB   working set: every page checked, then rewritten, round after round
//!         filled pages: written once, checked a few at a time; some of them zero
//!         (the rest of RAM is never touched, so zero)
//! ```
//!
//! A word's value is a function of its address and of the round that wrote it, so a page that is stale, lost or
//! misplaced is found within a round. On its serial line the guest writes `R 0000000a` when round ten is done, and `BAD
//! addr=… want=… got=… round=…` when it finds a wrong word; then it halts. It may be stopped and moved at any
//! instruction, in any number of passes. QEMU 7.2 has a bug that loses busy pages of any emulated guest after the
//! second pass. The program works around it; the comment at its head describes the bug.
//!
//! The program itself is `guest/program.s`, assembled by the compiler; it boots with `-kernel` (multiboot).

/// The parameters of the guest; [`image`](Self::image) makes the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    working_set: u32,
    filled: u32,
    zero_every: u32,
    filled_checked: u32,
    seed: u32,
    burst: u32,
    pause: u32,
    stride: u32,
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// Creates a guest that rewrites 8 MiB as fast as it can and has filled 32 MiB, every eighth page of it zero.
    pub fn new() -> Self {
        Self {
            working_set: 2048,
            filled: 8192,
            zero_every: 8,
            filled_checked: 256,
            seed: 0x6d66_6400,
            burst: 0,
            pause: 0,
            stride: 1,
        }
    }

    /// Sets how many pages it rewrites each round.
    #[must_use]
    pub fn working_set(mut self, pages: u32) -> Self {
        self.working_set = pages;
        self
    }

    /// Sets how many pages it fills once, at its start.
    #[must_use]
    pub fn filled(mut self, pages: u32) -> Self {
        self.filled = pages;
        self
    }

    /// Leaves every `n`th filled page zero; 0 leaves none.
    #[must_use]
    pub fn zero_every(mut self, n: u32) -> Self {
        self.zero_every = n;
        self
    }

    /// Sets how many of the filled pages it checks each round, continuing where the last round ended.
    #[must_use]
    pub fn filled_checked(mut self, pages: u32) -> Self {
        self.filled_checked = pages;
        self
    }

    /// Makes its contents different from those of another guest.
    #[must_use]
    pub fn seed(mut self, seed: u32) -> Self {
        self.seed = seed;
        self
    }

    /// Slows it down: after every `pages` rewritten pages it runs an empty loop `loops` times (a million take some
    /// milliseconds under emulation). With 0 pages it never pauses.
    #[must_use]
    pub fn pause(mut self, pages: u32, loops: u32) -> Self {
        self.burst = pages;
        self.pause = loops;
        self
    }

    /// Sets how far apart the pages are that it rewrites one after another: 1, in order. The working set must not be a multiple
    /// of a divisor of it, or it misses pages.
    #[must_use]
    pub fn stride(mut self, pages: u32) -> Self {
        self.stride = pages;
        self
    }

    /// The least RAM it needs, in bytes: its pages, and space at the top for the firmware's tables.
    pub fn least_memory(&self) -> u64 {
        WORKING_SET + (u64::from(self.working_set) + u64::from(self.filled)) * PAGE + FIRMWARE
    }

    /// Guest-physical addresses of the working set.
    pub fn working_set_range(&self) -> std::ops::Range<u64> {
        WORKING_SET..WORKING_SET + u64::from(self.working_set) * PAGE
    }

    /// Guest-physical addresses of the filled pages, including the zero ones.
    pub fn filled_range(&self) -> std::ops::Range<u64> {
        let start = self.working_set_range().end;
        start..start + u64::from(self.filled) * PAGE
    }

    /// The program, for `-kernel`.
    ///
    /// # Panics
    ///
    /// If it needs more memory than its 32-bit addresses and the machine's first range of RAM allow (2 GiB), or the kit
    /// was built for a processor that cannot assemble it.
    #[expect(clippy::cast_possible_truncation, reason = "addresses are below 2 GiB, as asserted")]
    pub fn image(&self) -> Vec<u8> {
        assert!(self.least_memory() <= 2 << 30, "{self:?} needs {:#x} bytes of RAM", self.least_memory());
        let mut image = program::bytes().to_vec();
        assert!(!image.is_empty(), "the guest's program needs a compiler for x86-64");
        let parameters = [
            self.working_set_range().start as u32,
            self.working_set,
            self.filled_range().start as u32,
            self.filled,
            self.zero_every,
            self.filled_checked.min(self.filled),
            self.seed,
            self.burst,
            self.pause,
            self.stride,
        ];
        for (place, value) in image[PARAMETERS..].chunks_exact_mut(4).zip(parameters) {
            // Lowest byte first, as the guest's processor reads it.
            place.copy_from_slice(&value.swap_bytes().to_be_bytes());
        }
        image
    }
}

/// The meaning of a line of the guest's serial output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// This round is done, and everything that it checked was right.
    Round(u32),
    /// A word was wrong; the line says which.
    Bad(String),
    /// Any other line, for example the firmware's output.
    Other(String),
}

impl Report {
    /// Reads a line.
    pub fn parse(line: &str) -> Self {
        let line = line.trim_end_matches('\r');
        let round = line.strip_prefix("R ").filter(|digits| digits.len() == 8);
        match round.and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
            Some(round) => Self::Round(round),
            None if line.starts_with("BAD ") => Self::Bad(line.to_owned()),
            None => Self::Other(line.to_owned()),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod program {
    //! The program's bytes, as the compiler's assembler made them.
    #![expect(unsafe_code, reason = "reads bytes between two labels of the assembler")]
    // UNSAFETY: the labels enclose one constant range of read-only data that lives as long as the process.

    use std::slice;

    std::arch::global_asm!(include_str!("guest/program.s"), options(att_syntax, raw));

    // SAFETY: both are labels that program.s defines.
    unsafe extern "C" {
        static multifd_testkit_guest_start: u8;
        static multifd_testkit_guest_end: u8;
    }

    pub(super) fn bytes() -> &'static [u8] {
        let start = &raw const multifd_testkit_guest_start;
        let end = &raw const multifd_testkit_guest_end;
        let length = end.addr() - start.addr();
        // SAFETY: program.s puts `end` after `start` in the same read-only section, `length` bytes apart.
        unsafe { slice::from_raw_parts(start, length) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod program {
    pub(super) fn bytes() -> &'static [u8] {
        &[]
    }
}

const PAGE: u64 = 0x1000;
/// Where the working set begins.
const WORKING_SET: u64 = 4 << 20;
/// The space that the firmware may use at the top of RAM.
const FIRMWARE: u64 = 1 << 20;
/// The offset of the parameters in the image: after the multiboot header.
const PARAMETERS: usize = 32;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn image_opens_with_a_multiboot_header_whose_sum_is_zero() {
        let image = Guest::new().image();
        let word = |at: usize| image[at..at + 4].iter().rev().fold(0u32, |w, byte| w << 8 | u32::from(*byte));
        assert_eq!(word(0), 0x1bad_b002);
        assert_eq!(word(0).wrapping_add(word(4)).wrapping_add(word(8)), 0);
        let (load, entry) = (word(16), word(28));
        assert!(entry > load && entry - load < u32::try_from(image.len()).unwrap(), "{entry:#x} {load:#x}");
    }

    #[test]
    fn image_fits_below_its_state() {
        assert!(Guest::new().image().len() <= 0x1000);
    }

    #[test]
    fn parameters_are_patched_in() {
        let image = Guest::new().working_set(0x1234).image();
        assert_eq!(image[PARAMETERS..PARAMETERS + 8], [0, 0, 0x40, 0, 0x34, 0x12, 0, 0]);
    }

    #[test]
    fn lines_are_told_apart() {
        assert_eq!(Report::parse("R 0000000a\r"), Report::Round(10));
        assert_eq!(Report::parse("BAD addr=1"), Report::Bad("BAD addr=1".into()));
        assert_eq!(Report::parse("R 12"), Report::Other("R 12".into()));
    }
}
