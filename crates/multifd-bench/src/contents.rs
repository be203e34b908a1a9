//! The contents of the guest's RAM, computed for each page from its number.
//!
//! Both ends can compute it, so a source fills its RAM without input, and a destination is checked without a copy.

use clap::ValueEnum;
use fastrand::Rng;
use serde::{Deserialize, Serialize};

/// A kind of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contents {
    /// Every page is noise.
    Nonzero,
    /// No page was ever written.
    Untouched,
    /// Every page was written, with zeros.
    Zeroed,
    /// 2 MiB of noise, 2 MiB of zeros, and so on.
    Mixed,
    /// A page of noise, a page of zeros, and so on: no two adjacent pages are sent.
    Scattered,
    /// A quarter of each page is noise, the rest is one byte repeated.
    Compressible,
}

pub(crate) const PAGE: usize = 4096;
/// Of [`Contents::Mixed`].
const STRETCH: u64 = 512;

impl Contents {
    /// Whether the page is all zero.
    pub(crate) fn is_zero(self, page: u64) -> bool {
        match self {
            Self::Nonzero | Self::Compressible => false,
            Self::Untouched | Self::Zeroed => true,
            Self::Mixed => page / STRETCH % 2 == 1,
            Self::Scattered => page % 2 == 1,
        }
    }

    /// Fills `bytes`, whole pages from `first` on.
    pub(crate) fn fill(self, first: u64, bytes: &mut [u8]) {
        for (page, bytes) in (first..).zip(bytes.chunks_exact_mut(PAGE)) {
            if self.is_zero(page) {
                bytes.fill(0);
                continue;
            }
            let noise = if self == Self::Compressible { PAGE / 4 } else { PAGE };
            let mut random = Rng::with_seed(page);
            for word in bytes[..noise].chunks_exact_mut(8) {
                word.copy_from_slice(&random.u64(..).to_be_bytes());
            }
            bytes[noise..].fill(0xa5);
        }
    }

    /// The first page that differs, from `first` on.
    pub(crate) fn wrong(self, first: u64, bytes: &[u8]) -> Option<u64> {
        let mut expected = [0; PAGE];
        (first..).zip(bytes.chunks_exact(PAGE)).find_map(|(page, bytes)| {
            self.fill(page, &mut expected);
            (bytes != expected).then_some(page)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Contents; 6] = [
        Contents::Nonzero,
        Contents::Untouched,
        Contents::Zeroed,
        Contents::Mixed,
        Contents::Scattered,
        Contents::Compressible,
    ];

    #[test]
    fn pages_are_what_their_number_says_and_no_two_of_noise_are_equal() {
        for kind in KINDS {
            let mut bytes = vec![7; 1100 * PAGE];
            kind.fill(3, &mut bytes);
            assert_eq!(kind.wrong(3, &bytes), None);
            for (page, bytes) in (3..).zip(bytes.chunks(PAGE)) {
                assert_eq!(bytes.iter().all(|byte| *byte == 0), kind.is_zero(page), "{kind:?} {page}");
            }
            bytes[500 * PAGE + 9] ^= 1;
            assert_eq!(kind.wrong(3, &bytes), Some(503));
        }
        let mut pages = [0; 2 * PAGE];
        Contents::Nonzero.fill(0, &mut pages);
        assert_ne!(pages[..PAGE], pages[PAGE..]);
    }

    #[test]
    fn half_of_mixed_and_of_scattered_ram_is_zero() {
        for kind in [Contents::Mixed, Contents::Scattered] {
            assert_eq!((0..4096).filter(|page| kind.is_zero(*page)).count(), 2048);
        }
    }
}
