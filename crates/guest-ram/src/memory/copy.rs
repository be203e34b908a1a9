//! Copies between guest memory and private buffers while other threads access the same guest memory.
//!
//! ```text
//! guest memory ── vectors and words, in assembly ──▶ private buffer, and back
//!              └─ the last bytes, by relaxed atomics
//! ```
//!
//! Two threads may copy into and out of one mapping at the same time, from safe code. By Rust's rules that is a data
//! race, unless every access is atomic. An atomic copy of a page byte by byte costs several times the speed of memory.
//! So the bytes are moved by assembly, which the compiler must treat like the relaxed atomic loads and stores of single
//! bytes that an interpreter runs in its place: no order between them is promised, and each byte is old or new. No
//! access is wider for the rules than one byte, so no two accesses of different widths race.
//!
//! The parts of I/O vectors may be private memory, too; for that the same access is as good.
//!
//! Rejected: `std::ptr::copy_nonoverlapping`, as the crate `vm-memory` uses for more than a word, and volatile accesses.
//! Both are races by the rules, although processors do not mind. `rep movsb` was tried as well: with the wrong distance
//! between the two ranges it takes ten times as long on some processors. `examples/zero_test.rs` measures this.
//!
//! UNSAFETY: this file reads and writes through raw pointers, and contains assembly that does.
#![expect(unsafe_code, reason = "guest memory is reached through pointers alone")]

use std::sync::atomic::{AtomicU8, Ordering};

/// Copies `len` bytes out of guest memory. Other threads may write to it at any time.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes until the call has ended. `to` must be private, and must not
/// overlap `from`.
pub(super) unsafe fn read(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    let done = unsafe { copy_steps(from, to, len) };
    for at in done..len {
        // SAFETY: `at < len`, inside what the caller has promised.
        let from = unsafe { from.add(at) };
        // SAFETY: as above.
        let to = unsafe { to.add(at) };
        // SAFETY: it is readable.
        let byte = unsafe { load(from) };
        // SAFETY: it is writable and private.
        unsafe { to.write(byte) };
    }
}

/// Copies `len` bytes into guest memory. Other threads may access it at any time.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes until the call has ended. `from` must be private, and must
/// not overlap `to`.
pub(super) unsafe fn write(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    let done = unsafe { copy_steps(from, to, len) };
    for at in done..len {
        // SAFETY: `at < len`, inside what the caller has promised.
        let from = unsafe { from.add(at) };
        // SAFETY: as above.
        let to = unsafe { to.add(at) };
        // SAFETY: it is readable and private.
        let byte = unsafe { from.read() };
        // SAFETY: it is writable, and a byte is always aligned.
        unsafe { AtomicU8::from_ptr(to) }.store(byte, Ordering::Relaxed);
    }
}

/// Writes `len` zeros. At any time, other threads may access the range.
///
/// # Safety
/// `to` must be writable for `len` bytes until the call has ended.
pub(super) unsafe fn clear(to: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    let done = unsafe { clear_steps(to, len) };
    for at in done..len {
        // SAFETY: `at < len`, inside what the caller has promised.
        let to = unsafe { to.add(at) };
        // SAFETY: it is writable, and a byte is always aligned.
        unsafe { AtomicU8::from_ptr(to) }.store(0, Ordering::Relaxed);
    }
}

/// Reads a byte that other threads may write.
///
/// # Safety
/// It must be readable.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(super) unsafe fn load(from: *const u8) -> u8 {
    // SAFETY: the caller's promise. It is only read, so the memory need not be writable.
    unsafe { AtomicU8::from_ptr(from.cast_mut()) }.load(Ordering::Relaxed)
}

/// # Safety
/// As the other one of this name.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
pub(super) unsafe fn load(from: *const u8) -> u8 {
    let byte;
    // SAFETY: reads the byte that the caller has promised, and no other.
    unsafe {
        std::arch::asm!("mov {byte}, byte ptr [{from}]", from = in(reg) from, byte = out(reg_byte) byte,
            options(nostack, readonly, preserves_flags));
    }
    byte
}

/// # Safety
/// As the other one of this name.
#[cfg(all(target_arch = "aarch64", not(miri)))]
#[inline]
pub(super) unsafe fn load(from: *const u8) -> u8 {
    let byte: u32;
    // SAFETY: reads the byte that the caller has promised, and no other.
    unsafe {
        std::arch::asm!("ldrb {byte:w}, [{from}]", from = in(reg) from, byte = out(reg) byte,
            options(nostack, readonly, preserves_flags));
    }
    u8::try_from(byte).unwrap_or_default()
}

/// Copies as much as assembly can. Returns the number of bytes that are done; the rest is copied byte by byte.
///
/// # Safety
/// As [`read`] or [`write`].
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
unsafe fn copy_steps(_from: *const u8, _to: *mut u8, _len: usize) -> usize {
    0
}

/// Clears as much as assembly can. Returns the number of bytes that are done; the rest is cleared byte by byte.
///
/// # Safety
/// As [`clear`].
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
unsafe fn clear_steps(_to: *mut u8, _len: usize) -> usize {
    0
}

/// # Safety
/// As the other one of this name.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy_steps(from: *const u8, to: *mut u8, len: usize) -> usize {
    let mut done = 0;
    if len >= AVX2_STEP && std::arch::is_x86_feature_detected!("avx2") {
        done = len / AVX2_STEP * AVX2_STEP;
        // SAFETY: the processor has AVX2, and `done <= len`.
        unsafe { avx2(from, to, len / AVX2_STEP) };
    }
    let words = (len - done) / 16;
    if words > 0 {
        // SAFETY: `done <= len`, so the pointer stays inside the range or one past its end.
        let from = unsafe { from.add(done) };
        // SAFETY: as above.
        let to = unsafe { to.add(done) };
        // SAFETY: what is left has `words` times 16 bytes.
        unsafe { sse2(from, to, words) };
        done += words * 16;
    }
    if done < len && len >= 16 {
        // The last 16 bytes: some of them are copied twice, which is faster than one by one.
        // SAFETY: `len - 16` lies inside the range.
        let from = unsafe { from.add(len - 16) };
        // SAFETY: as above.
        let to = unsafe { to.add(len - 16) };
        // SAFETY: 16 bytes are left from there on.
        unsafe { sse2(from, to, 1) };
        done = len;
    }
    done
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
const AVX2_STEP: usize = 128;

/// # Safety
/// `steps` times 128 bytes must be readable at `from` and writable at `to`, `steps` at least 1; the processor must have
/// AVX2.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx2")]
unsafe fn avx2(from: *const u8, to: *mut u8, steps: usize) {
    // SAFETY: reads and writes the bytes that the caller has promised, and no others; writes registers that it names.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu {a}, ymmword ptr [{from}]",
            "vmovdqu {b}, ymmword ptr [{from} + 32]",
            "vmovdqu {c}, ymmword ptr [{from} + 64]",
            "vmovdqu {d}, ymmword ptr [{from} + 96]",
            "vmovdqu ymmword ptr [{to}], {a}",
            "vmovdqu ymmword ptr [{to} + 32], {b}",
            "vmovdqu ymmword ptr [{to} + 64], {c}",
            "vmovdqu ymmword ptr [{to} + 96], {d}",
            "add {from}, 128",
            "add {to}, 128",
            "sub {steps}, 1",
            "jnz 2b",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            steps = inout(reg) steps => _,
            a = out(ymm_reg) _,
            b = out(ymm_reg) _,
            c = out(ymm_reg) _,
            d = out(ymm_reg) _,
            options(nostack),
        );
    }
}

/// SSE2, which every x86-64 processor has.
///
/// # Safety
/// `steps` times 16 bytes must be readable at `from` and writable at `to`, `steps` at least 1.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn sse2(from: *const u8, to: *mut u8, steps: usize) {
    // SAFETY: reads and writes the bytes that the caller has promised, and no others; writes registers that it names.
    unsafe {
        std::arch::asm!(
            "2:",
            "movdqu {a}, xmmword ptr [{from}]",
            "movdqu xmmword ptr [{to}], {a}",
            "add {from}, 16",
            "add {to}, 16",
            "sub {steps}, 1",
            "jnz 2b",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            steps = inout(reg) steps => _,
            a = out(xmm_reg) _,
            options(nostack),
        );
    }
}

/// # Safety
/// As the other one of this name.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn clear_steps(to: *mut u8, len: usize) -> usize {
    // SAFETY: writes the bytes that the caller has promised, and no others; the direction flag is clear, as it is
    // wherever assembly begins.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            in("al") 0_u8,
            options(nostack, preserves_flags),
        );
    }
    len
}

/// The number of bytes of a step on 64-bit Arm.
#[cfg(all(target_arch = "aarch64", not(miri)))]
const STEP: usize = 64;

/// # Safety
/// As the other one of this name.
#[cfg(all(target_arch = "aarch64", not(miri)))]
unsafe fn copy_steps(from: *const u8, to: *mut u8, len: usize) -> usize {
    let steps = len / STEP;
    if steps == 0 {
        return 0;
    }
    // SAFETY: reads and writes `steps * STEP <= len` of the bytes that the caller has promised; writes registers that it
    // names.
    unsafe {
        std::arch::asm!(
            "2:",
            "ldp {a:q}, {b:q}, [{from}]",
            "ldp {c:q}, {d:q}, [{from}, #32]",
            "stp {a:q}, {b:q}, [{to}]",
            "stp {c:q}, {d:q}, [{to}, #32]",
            "add {from}, {from}, #64",
            "add {to}, {to}, #64",
            "subs {steps}, {steps}, #1",
            "b.ne 2b",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            steps = inout(reg) steps => _,
            a = out(vreg) _,
            b = out(vreg) _,
            c = out(vreg) _,
            d = out(vreg) _,
            options(nostack),
        );
    }
    steps * STEP
}

/// # Safety
/// As the other one of this name.
#[cfg(all(target_arch = "aarch64", not(miri)))]
unsafe fn clear_steps(to: *mut u8, len: usize) -> usize {
    let steps = len / STEP;
    if steps == 0 {
        return 0;
    }
    // SAFETY: writes `steps * STEP <= len` of the bytes that the caller has promised; writes registers that it names.
    unsafe {
        std::arch::asm!(
            "2:",
            "stp xzr, xzr, [{to}]",
            "stp xzr, xzr, [{to}, #16]",
            "stp xzr, xzr, [{to}, #32]",
            "stp xzr, xzr, [{to}, #48]",
            "add {to}, {to}, #64",
            "subs {steps}, {steps}, #1",
            "b.ne 2b",
            to = inout(reg) to => _,
            steps = inout(reg) steps => _,
            options(nostack),
        );
    }
    steps * STEP
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Mapping;

    /// Bytes before and after the range, which must not be written.
    const AROUND: usize = 70;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 1000 }))]

        #[test]
        fn every_length_at_every_address_is_copied_and_cleared_and_nothing_beside_it(
            len in if cfg!(miri) { (0_usize..50).boxed() } else {
                prop_oneof![0_usize..700, Just(1024), Just(4096), Just(65536 + 1)].boxed()
            },
            (from_shift, to_shift) in (0_usize..64, 0_usize..64),
            seed: u8,
        ) {
            let from: Vec<u8> = (0..from_shift + len).map(|at| u8::try_from(at % 251).expect("small") ^ seed).collect();
            let mut to = vec![0xee; AROUND + to_shift + len + AROUND];
            let range = AROUND + to_shift..AROUND + to_shift + len;
            // SAFETY: both ranges have `len` bytes, in two vectors.
            unsafe { write(from[from_shift..].as_ptr(), to[range.clone()].as_mut_ptr(), len) };
            prop_assert_eq!(&to[range.clone()], &from[from_shift..]);
            let mut back = vec![0; len];
            // SAFETY: as above.
            unsafe { read(to[range.clone()].as_mut_ptr(), back.as_mut_ptr(), len) };
            prop_assert_eq!(&back, &from[from_shift..]);
            // SAFETY: the range has `len` bytes.
            unsafe { clear(to[range.clone()].as_mut_ptr(), len) };
            prop_assert!(to[range.clone()].iter().all(|byte| *byte == 0));
            let beside = to[..range.start].iter().chain(&to[range.end..]);
            prop_assert!(beside.into_iter().all(|byte| *byte == 0xee));
        }
    }

    /// Regression: a data race by Rust's rules, from safe code. An interpreter (`cargo xtask sanitize miri`) reports it;
    /// without one, this test only shows that each byte is old or new.
    #[test]
    fn two_threads_that_copy_into_and_out_of_one_mapping_do_not_race() {
        const LEN: usize = if cfg!(miri) { 150 } else { 4096 + 3 };
        const ROUNDS: u8 = if cfg!(miri) { 3 } else { 200 };
        let mapping = Mapping::anonymous(LEN as u64).expect("memory");
        let whole = || mapping.slice(0, LEN).expect("inside");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    whole().copy_from(&[round; LEN]);
                    whole().clear();
                    // An address and a length that are a multiple of nothing.
                    mapping.slice(3, LEN - 10).expect("inside").copy_from(&[round; LEN - 10]);
                    crate::PartMut::from(whole()).copy_from_at(1, &[round; 70]);
                    crate::PartMut::from(whole()).copy_from(&[round; 9]);
                }
            });
            let mut found = [0; LEN];
            for _ in 0..ROUNDS {
                let _ = whole().is_zero();
                whole().copy_to(&mut found);
                assert!(found.iter().all(|byte| *byte <= ROUNDS));
                assert_eq!(crate::Part::from(whole()).copy_to(&mut found), LEN);
                assert!(found.iter().all(|byte| *byte <= ROUNDS));
            }
        });
        let mut found = [0; 9];
        mapping.slice(0, 9).expect("inside").copy_to(&mut found);
        assert_eq!(found, [ROUNDS; 9]);
    }
}
