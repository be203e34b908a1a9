//! Checks whether guest memory is zero, at the speed at which memory can be read.
//!
//! ```text
//! first, middle and last word ─▶ vectors: AVX2 or SSE2, NEON ─▶ the remaining bytes
//! most pages end here            (elsewhere words)
//! ```
//!
//! With AVX2 the speed of memory is the limit. AVX-512 was tried: it is faster in the caches, where guest RAM seldom
//! is, and not faster from memory. `examples/zero_test.rs` measures this.
//!
//! The input is a pointer and a length that the caller has checked to lie inside a mapping. The answer is valid for the
//! moment at which each byte was read. The guest may write at the same time, and no Rust reference is made. An ordinary
//! or volatile load would then be a data race by Rust's rules. So they are not used: words and vectors are read inside
//! `asm!`, which the compiler must treat like relaxed atomic loads of single bytes, as in [`copy`](super::copy); the
//! remaining bytes, and all bytes in an interpreter, are such loads. An answer that misses the newest byte does no
//! harm: the write has set the page's dirty bit again.
//!
//! UNSAFETY: this file reads through raw pointers, and contains assembly that does.
#![expect(unsafe_code, reason = "guest memory is reached through pointers alone")]

use super::copy::load;

/// Whether the `len` bytes at `start` are all zero.
///
/// # Safety
/// They must be mapped and readable until the call has ended.
pub(crate) unsafe fn is_zero(start: *const u8, len: usize) -> bool {
    if len >= 2 * WORD {
        for at in [0, len / 2, len - WORD] {
            // SAFETY: `at <= len - WORD`: half of the length leaves as much after it.
            if unsafe { word(start, at) } != 0 {
                return false;
            }
        }
    }
    // SAFETY: the caller's promise is passed on.
    unsafe { whole(best(), start, len) }
}

/// A method to check memory in steps of vectors.
#[derive(Clone, Copy)]
struct Scan {
    /// The number of bytes per step.
    step: usize,
    /// Whether the given number of steps from a pointer on, at least one, are zero. Only for a processor that has the
    /// vectors.
    steps: unsafe fn(*const u8, usize) -> bool,
}

/// The fastest method that this processor supports.
#[cfg(not(miri))]
fn best() -> Scan {
    #[cfg(target_arch = "x86_64")]
    return if std::arch::is_x86_feature_detected!("avx2") { AVX2 } else { SSE2 };
    #[cfg(target_arch = "aarch64")]
    return NEON;
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    WORDS
}

/// The method that an interpreter can run.
#[cfg(miri)]
fn best() -> Scan {
    WORDS
}

/// Checks whole steps first, then the rest.
///
/// # Safety
/// As [`is_zero`]; and the processor must have what `scan` needs.
unsafe fn whole(scan: Scan, start: *const u8, len: usize) -> bool {
    let steps = len / scan.step;
    // SAFETY: `steps * step <= len`, so all of it is inside what the caller has promised.
    if steps > 0 && !unsafe { (scan.steps)(start, steps) } {
        return false;
    }
    (steps * scan.step..len).all(|at| {
        // SAFETY: `at < len`, inside what the caller has promised.
        let byte = unsafe { start.add(at) };
        // SAFETY: inside, as shown above.
        unsafe { load(byte) == 0 }
    })
}

/// The eight bytes at `start + at`, in the order of this processor.
///
/// # Safety
/// They must be mapped and readable.
#[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
#[inline]
unsafe fn word(start: *const u8, at: usize) -> u64 {
    // SAFETY: the caller's promise.
    let at = unsafe { start.add(at) };
    let word;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reads the eight bytes that the caller has promised, and no others, at any address.
    unsafe {
        std::arch::asm!("mov {word}, qword ptr [{at}]", at = in(reg) at, word = out(reg) word,
            options(nostack, readonly, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("ldr {word:x}, [{at}]", at = in(reg) at, word = out(reg) word,
            options(nostack, readonly, preserves_flags));
    }
    word
}

/// Any bit of the eight bytes at `start + at`: zero only if all of them are.
///
/// # Safety
/// They must be mapped and readable.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
unsafe fn word(start: *const u8, at: usize) -> u64 {
    (at..at + WORD).fold(0, |any, at| {
        // SAFETY: the caller's promise.
        let byte = unsafe { start.add(at) };
        // SAFETY: as above.
        any | u64::from(unsafe { load(byte) })
    })
}

const WORD: usize = size_of::<u64>();

/// For every processor, eight words per step.
#[cfg_attr(
    all(not(miri), not(test), any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(dead_code, reason = "vectors are quicker")
)]
const WORDS: Scan = Scan { step: 8 * WORD, steps: words };

/// # Safety
/// `steps` times 64 bytes at `start` must be mapped and readable.
unsafe fn words(start: *const u8, steps: usize) -> bool {
    (0..steps).all(|step| {
        let any = (0..8).fold(0, |any, at| {
            // SAFETY: a word of one of the steps that the caller has promised.
            any | unsafe { word(start, (step * 8 + at) * WORD) }
        });
        any == 0
    })
}

/// SSE2, which every x86-64 processor has.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const SSE2: Scan = Scan { step: 64, steps: sse2 };

/// # Safety
/// `steps` times 64 bytes at `start` must be mapped and readable, `steps` at least 1.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn sse2(start: *const u8, mut steps: usize) -> bool {
    // SAFETY: reads the bytes that the caller has promised, and no others; writes registers that it names.
    unsafe {
        std::arch::asm!(
            "pxor {none}, {none}",
            "2:",
            "movdqu {a}, xmmword ptr [{at}]",
            "movdqu {b}, xmmword ptr [{at} + 16]",
            "movdqu {c}, xmmword ptr [{at} + 32]",
            "movdqu {d}, xmmword ptr [{at} + 48]",
            "por {a}, {b}",
            "por {c}, {d}",
            "por {a}, {c}",
            "pcmpeqb {a}, {none}",
            "pmovmskb {mask:e}, {a}",
            "cmp {mask:e}, 0xffff",
            "jne 3f",
            "add {at}, 64",
            "sub {steps}, 1",
            "jnz 2b",
            "3:",
            at = inout(reg) start => _,
            steps = inout(reg) steps,
            mask = out(reg) _,
            none = out(xmm_reg) _,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            options(nostack, readonly),
        );
    }
    steps == 0
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
const AVX2: Scan = Scan { step: 128, steps: avx2 };

/// # Safety
/// `steps` times 128 bytes at `start` must be mapped and readable, `steps` at least 1; the processor must have AVX2.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx2")]
unsafe fn avx2(start: *const u8, mut steps: usize) -> bool {
    // SAFETY: reads the bytes that the caller has promised, and no others; writes registers that it names.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu {a}, ymmword ptr [{at}]",
            "vmovdqu {b}, ymmword ptr [{at} + 32]",
            "vpor {a}, {a}, ymmword ptr [{at} + 64]",
            "vpor {b}, {b}, ymmword ptr [{at} + 96]",
            "vpor {a}, {a}, {b}",
            "vptest {a}, {a}",
            "jnz 3f",
            "add {at}, 128",
            "sub {steps}, 1",
            "jnz 2b",
            "3:",
            at = inout(reg) start => _,
            steps = inout(reg) steps,
            a = out(ymm_reg) _,
            b = out(ymm_reg) _,
            options(nostack, readonly),
        );
    }
    steps == 0
}

/// NEON, which every 64-bit Arm processor that runs Linux has.
#[cfg(all(target_arch = "aarch64", not(miri)))]
const NEON: Scan = Scan { step: 64, steps: neon };

/// # Safety
/// `steps` times 64 bytes at `start` must be mapped and readable, `steps` at least 1.
#[cfg(all(target_arch = "aarch64", not(miri)))]
unsafe fn neon(start: *const u8, mut steps: usize) -> bool {
    // SAFETY: reads the bytes that the caller has promised, and no others; writes registers that it names.
    unsafe {
        std::arch::asm!(
            "2:",
            "ldp {a:q}, {b:q}, [{at}]",
            "ldp {c:q}, {d:q}, [{at}, #32]",
            "orr {a:v}.16b, {a:v}.16b, {b:v}.16b",
            "orr {c:v}.16b, {c:v}.16b, {d:v}.16b",
            "orr {a:v}.16b, {a:v}.16b, {c:v}.16b",
            "umaxp {a:v}.4s, {a:v}.4s, {a:v}.4s",
            "fmov {any}, {a:d}",
            "cbnz {any}, 3f",
            "add {at}, {at}, #64",
            "subs {steps}, {steps}, #1",
            "b.ne 2b",
            "3:",
            at = inout(reg) start => _,
            steps = inout(reg) steps,
            any = out(reg) _,
            a = out(vreg) _,
            b = out(vreg) _,
            c = out(vreg) _,
            d = out(vreg) _,
            options(nostack, readonly),
        );
    }
    steps == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All methods that this processor supports.
    fn known() -> Vec<(&'static str, Scan)> {
        #[cfg_attr(miri, expect(unused_mut, reason = "an interpreter knows one way"))]
        let mut known = vec![("words", WORDS)];
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            known.push(("SSE2", SSE2));
            if std::arch::is_x86_feature_detected!("avx2") {
                known.push(("AVX2", AVX2));
            }
        }
        #[cfg(all(target_arch = "aarch64", not(miri)))]
        known.push(("NEON", NEON));
        known
    }

    /// The answer of each method for these bytes; the answer of the whole test is last.
    fn answers(bytes: &mut [u8]) -> Vec<(&'static str, bool)> {
        let mut answers: Vec<_> = known()
            .into_iter()
            .map(|(name, scan)| {
                // SAFETY: the slice is readable, and `known` lists only methods that the processor supports.
                (name, unsafe { whole(scan, bytes.as_mut_ptr(), bytes.len()) })
            })
            .collect();
        // SAFETY: the slice is readable.
        answers.push(("is_zero", unsafe { is_zero(bytes.as_mut_ptr(), bytes.len()) }));
        answers
    }

    #[test]
    fn a_page_of_any_size_that_is_zero_is_found_by_every_way() {
        for len in [0, 1, 15, 16, 17, 63, 64, 255, 256, 257, 1024, 4096, 16384] {
            // The bytes before and after the range must not be read.
            let mut bytes = vec![0xff; len + 2];
            bytes[1..=len].fill(0);
            for (name, zero) in answers(&mut bytes[1..=len]) {
                assert!(zero, "{name}: {len} bytes");
            }
        }
    }

    #[test]
    fn a_bit_in_any_byte_of_a_page_is_found_by_every_way() {
        let len = if cfg!(miri) { 300 } else { 4096 };
        let mut bytes = vec![0; len];
        for at in 0..len {
            bytes[at] = 1 << (at % 8);
            for (name, zero) in answers(&mut bytes) {
                assert!(!zero, "{name}: byte {at} of {len}");
            }
            bytes[at] = 0;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 2000 }))]

        #[test]
        fn one_bit_anywhere_in_any_length_at_any_address_is_found(
            len in prop_oneof![1_usize..600, Just(1024), Just(4096), Just(8192), Just(16384), Just(65536)],
            shift in 0_usize..64,
            at: prop::sample::Index,
            bit in 0_u32..8,
        ) {
            let mut bytes = vec![0xff; shift + len + 1];
            let page = &mut bytes[shift..shift + len];
            page.fill(0);
            page[at.index(len)] = 1 << bit;
            for (name, zero) in answers(page) {
                prop_assert!(!zero, "{}", name);
            }
            page.fill(0);
            for (name, zero) in answers(page) {
                prop_assert!(zero, "{}", name);
            }
        }

        #[test]
        fn every_way_says_what_words_say(
            mut bytes in prop::collection::vec(prop_oneof![400 => Just(0_u8), 1 => any::<u8>()], 0..1500),
        ) {
            let expected = bytes.iter().all(|byte| *byte == 0);
            for (name, zero) in answers(&mut bytes) {
                prop_assert_eq!(zero, expected, "{}", name);
            }
        }
    }

    /// The answers during the race do not matter: afterwards the answer must match the contents.
    #[test]
    fn a_page_that_is_written_meanwhile_is_looked_at_without_harm() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let mapping = crate::Mapping::anonymous(4096).expect("a page");
        let page = mapping.slice(0, 4096).expect("inside");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..if cfg!(miri) { 8 } else { 20_000_u64 } {
                    let byte = mapping.slice(round * 7 % 4096, 1).expect("inside");
                    byte.copy_from(&[1]);
                    byte.clear();
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                let _ = page.is_zero();
            }
        });
        assert!(page.is_zero());
        mapping.slice(77, 1).expect("inside").copy_from(&[1]);
        assert!(!page.is_zero());
    }
}
