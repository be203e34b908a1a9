//! Distinguishes noise and runs from all other data.
//!
//! A compressor looks for matches in noise byte by byte and finds none, and it processes a run of one byte in small steps.
//! Samples show at a fraction of this cost whether data consist only of noise and long runs, and each method has a fast way
//! to write these. All other data are for the compressor; sampling their beginning is the only extra cost.
//!
//! A wrong answer only costs bytes: the stretches always contain the original bytes.

/// Consecutive bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stretch {
    /// This number of bytes that do not compress.
    Noise(usize),
    /// This number of equal bytes.
    Run(usize),
}

pub(super) struct Sieve {
    stretches: Vec<Stretch>,
    /// The first bytes of earlier noise, indexed by their hash. Noise that is repeated is a match for the compressor.
    found: Box<[u64; MEMORY]>,
}

impl Sieve {
    pub(super) fn new() -> Self {
        Self { stretches: Vec::new(), found: Box::new([0; MEMORY]) }
    }

    /// The stretches of `bytes`, in order, if these consist of noise and runs, and at least an eighth is noise. Without
    /// noise the compressor is fast.
    /// work to anybody.
    pub(super) fn sift(&mut self, bytes: &[u8]) -> Option<&[Stretch]> {
        self.stretches.clear();
        let (mut noise, mut unjudged, mut judged, mut distinct_bytes) = (0, 0, 0_usize, 0);
        let mut rest = bytes;
        while !rest.is_empty() {
            let run = run(rest);
            if run >= RUN {
                self.stretches.push(Stretch::Run(run));
                rest = &rest[run..];
                continue;
            }
            let piece;
            (piece, rest) = rest.split_at(before_run(rest));
            if piece.len() < SAMPLE {
                unjudged += piece.len();
                if unjudged > bytes.len() / 256 + noise / 16 {
                    return None;
                }
            } else {
                if !begins_noisy(piece) {
                    return None;
                }
                let distinct = distinct(piece);
                if distinct < FEWEST || self.is_repeated(piece) {
                    return None;
                }
                judged += 1;
                distinct_bytes += distinct;
            }
            noise += piece.len();
            match self.stretches.last_mut() {
                Some(Stretch::Noise(length)) => *length += piece.len(),
                _ => self.stretches.push(Stretch::Noise(piece.len())),
            }
        }
        // The more pieces there are, the closer their mean is to the expected value for noise.
        let noisy = distinct_bytes + (EXPECTED - FEWEST) * judged.isqrt() >= EXPECTED * judged;
        (noisy && noise * 8 >= bytes.len()).then_some(&self.stretches)
    }

    /// Whether a recent piece began with the same bytes.
    fn is_repeated(&mut self, piece: &[u8]) -> bool {
        let Some(head) = piece.first_chunk().copied().map(u64::from_be_bytes) else { return false };
        let hash = head.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - MEMORY.ilog2());
        let place = &mut self.found[usize::try_from(hash).unwrap_or_default()];
        std::mem::replace(place, head) == head
    }
}

/// How often the first byte is repeated, including itself. May be 0 if it occurs fewer than eight times.
fn run(bytes: &[u8]) -> usize {
    let Some(head) = bytes.first_chunk::<8>() else { return 0 };
    let byte = head[0];
    if *head != [byte; 8] {
        return 0;
    }
    let same = [byte; STRIDE];
    let (strides, _) = bytes.as_chunks::<STRIDE>();
    let whole = strides.iter().take_while(|stride| **stride == same).count() * STRIDE;
    whole + bytes[whole..].iter().take_while(|next| **next == byte).count()
}

/// The number of bytes before the next run, at least one and at most a piece. A run is found if it fills the first eight
/// bytes of a stride.
fn before_run(bytes: &[u8]) -> usize {
    let piece = &bytes[..bytes.len().min(PIECE)];
    let strides = piece.as_chunks::<STRIDE>().0.iter().enumerate();
    let mut starts = strides.filter(|(_, stride)| stride[..8] == [stride[0]; 8]).map(|(at, stride)| {
        let at = at * STRIDE;
        at - piece[..at].iter().rev().take_while(|before| **before == stride[0]).count()
    });
    starts.find(|start| *start > 0 && run(&bytes[*start..]) >= RUN).unwrap_or(piece.len())
}

/// Whether few of the first bytes are equal. This excludes most compressible data before a sample is taken: among 32 bytes
/// of noise two are equal, in text a dozen.
fn begins_noisy(piece: &[u8]) -> bool {
    let mut seen = [0_u64; 4];
    for byte in &piece[..STRIDE] {
        seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }
    seen.iter().map(|seen| seen.count_ones()).sum::<u32>() > 23
}

/// The number of different values in a sample of [`SAMPLE`] bytes. The sample has eight parts, each at a different position
/// in its eighth of the piece, so that each byte of a repeated record is sampled.
fn distinct(piece: &[u8]) -> usize {
    let mut seen = [0_u8; 256];
    let eighth = piece.len() / 8;
    for (nth, eighth) in piece.chunks_exact(eighth).take(8).enumerate() {
        let at = nth * 37 % (eighth.len() - SAMPLE / 8 + 1);
        for byte in &eighth[at..at + SAMPLE / 8] {
            seen[usize::from(*byte)] = 1;
        }
    }
    // Sixteen sums are computed at once. Each is 16 at most.
    let mut sums = [0_u8; 16];
    for row in seen.as_chunks::<16>().0 {
        for (sum, seen) in sums.iter_mut().zip(row) {
            *sum += seen;
        }
    }
    sums.iter().map(|sum| usize::from(*sum)).sum()
}

/// The length of the shortest run.
const RUN: usize = 64;
/// Bytes compared at once.
const STRIDE: usize = 32;
/// The greatest length that is judged by one sample.
const PIECE: usize = 4096;
/// The length of a sample. Shorter pieces are not judged.
const SAMPLE: usize = 256;
/// The number of different values in a sample of noise: 256 × (1 − (255 ÷ 256)^256). The standard deviation is 5.
const EXPECTED: usize = 162;
/// A sample with fewer different values is not noise. Data that could be compressed by a twentieth have 144.
const FEWEST: usize = 145;
/// The number of remembered beginnings: those of 8 MiB of noise.
const MEMORY: usize = 2048;

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::{Stretch::*, *};

    fn noise(length: usize) -> Vec<u8> {
        let mut random = Rng::with_seed(length as u64);
        std::iter::repeat_with(|| random.u8(..)).take(length).collect()
    }

    fn sift(bytes: &[u8]) -> Option<Vec<Stretch>> {
        Sieve::new().sift(bytes).map(<[Stretch]>::to_vec)
    }

    #[test]
    fn noise_and_runs_are_found_to_the_byte() {
        let bytes = [&noise(1000)[..], &[7; 3000], &noise(5001), &[0; 64]].concat();
        let found = sift(&bytes).expect("noise and runs");
        let (mut at, mut runs) = (0, Vec::new());
        for stretch in &found {
            match *stretch {
                Noise(length) => at += length,
                Run(length) => {
                    assert!(bytes[at..at + length].iter().all(|byte| *byte == bytes[at]));
                    runs.push(at..at + length);
                    at += length;
                }
            }
        }
        assert_eq!(at, bytes.len());
        assert_eq!(runs, [1000..4000, 9001..9065]);
        assert_eq!(sift(&noise(1 << 16)), Some(vec![Noise(1 << 16)]));
    }

    #[test]
    fn every_page_of_noise_is_found() {
        let bytes = noise(512 << 10);
        let mut sieve = Sieve::new();
        let found = bytes.chunks(4096).filter(|page| sieve.sift(page).is_some()).count();
        assert!(found >= 126, "{found} of 128");
    }

    #[test]
    fn what_compresses_is_not_noise() {
        let mut random = Rng::with_seed(3);
        let mut bytes = |make: &mut dyn FnMut(&mut Rng, usize) -> u8| -> Vec<u8> {
            (0..4096).map(|at| make(&mut random, at)).collect()
        };
        let digits = bytes(&mut |random, _| random.u8(b'0'..=b'9'));
        let six_bits = bytes(&mut |random, _| random.u8(..64));
        let seven_bits = bytes(&mut |random, _| random.u8(..128));
        let halves_of_words = bytes(&mut |random, at| if at % 8 < 4 { random.u8(..) } else { 0x55 });
        let hashes_in_records = bytes(&mut |random, at| {
            if at % 128 < 32 { random.u8(..) } else { [b"multifd", b"packets"][at / 128 % 2][at % 7] }
        });
        let half_text =
            bytes(&mut |random, at| if at < 2048 { random.u8(..) } else { random.u8(b'a'..=b'z') });
        for bytes in [digits, six_bits, seven_bits, halves_of_words, hashes_in_records, half_text] {
            assert_eq!(sift(&bytes), None, "{:?}", &bytes[..16]);
        }
    }

    #[test]
    fn noise_that_comes_again_is_not_noise() {
        let mut sieve = Sieve::new();
        let page = noise(4096);
        assert!(sieve.sift(&page).is_some());
        assert!(sieve.sift(&noise(4095)).is_some());
        assert!(sieve.sift(&page).is_none());
    }

    #[test]
    fn runs_alone_and_nothing_at_all_are_left_to_the_compressor() {
        assert_eq!(sift(&[5; 4096]), None);
        assert_eq!(sift(&[&noise(300)[..], &[5; 4096 - 300]].concat()), None);
        assert_eq!(sift(&[1, 2, 3].repeat(1000)), None);
    }

    #[test]
    fn a_run_too_short_to_be_one_is_part_of_the_noise() {
        let mut bytes = noise(1 << 16);
        bytes[1024..1056].fill(9);
        assert_eq!(sift(&bytes), Some(vec![Noise(1 << 16)]));
    }
}
