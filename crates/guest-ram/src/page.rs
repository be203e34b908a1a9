//! Page size, page index and block offset: three numbers that must not be mixed up.
//!
//! Sizes and offsets from a caller or a peer are converted to values that are valid by construction. Migration counts
//! in *target* pages, the page size of the guest's architecture, regardless of the pages of the host.

use std::fmt;

/// The size of a target page: a power of two from 4 KiB to 64 KiB.
///
/// x86 guests have 4 KiB pages, 64-bit Arm guests 4, 16 or 64 KiB. The default is 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize {
    bits: u8,
}

impl PageSize {
    /// 4 KiB, the page size of x86 guests.
    pub const KIB_4: Self = Self { bits: Self::MIN_BITS };
    /// 16 KiB.
    pub const KIB_16: Self = Self { bits: 14 };
    /// 64 KiB, the greatest supported page size.
    pub const KIB_64: Self = Self { bits: Self::MAX_BITS };

    const MIN_BITS: u8 = 12;
    const MAX_BITS: u8 = 16;

    /// Creates the page size of `1 << bits` bytes; `None` outside 12..=16.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits < Self::MIN_BITS as u32 || bits > Self::MAX_BITS as u32 {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most 16, checked above")]
        Some(Self { bits: bits as u8 })
    }

    /// Creates the page size of `bytes` bytes; `None` if it is not a power of two from 4 KiB to 64 KiB.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() { Self::from_bits(bytes.trailing_zeros()) } else { None }
    }

    /// The binary logarithm of the size: 12 for 4 KiB.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.bits as u32
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> usize {
        1 << self.bits
    }

    /// The number of whole or partial pages in `length` bytes.
    #[inline]
    pub const fn pages_in(self, length: u64) -> u64 {
        length.div_ceil(1 << self.bits)
    }

    /// The number of whole pages in `length` bytes.
    #[inline]
    pub const fn whole_pages_in(self, length: u64) -> u64 {
        length >> self.bits
    }

    /// The page that starts at `offset`; `None` if `offset` is not on a page boundary.
    #[inline]
    pub const fn page_at(self, offset: BlockOffset) -> Option<PageIndex> {
        if offset.0 & ((1 << self.bits) - 1) == 0 { Some(PageIndex(offset.0 >> self.bits)) } else { None }
    }

    /// The offset of `page`; `None` if it is beyond 64 bits.
    #[inline]
    pub const fn offset_of(self, page: PageIndex) -> Option<BlockOffset> {
        if page.0 >> (64 - self.bits) == 0 { Some(BlockOffset(page.0 << self.bits)) } else { None }
    }
}

impl Default for PageSize {
    fn default() -> Self {
        Self::KIB_4
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.bytes() >> 10)
    }
}

/// The number of a page within its block, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A byte offset within a RAM block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockOffset(pub u64);

impl fmt::Display for BlockOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_from_4_to_64_kib_exist_and_no_others() {
        let sizes: Vec<u64> =
            (0..=u64::BITS).filter_map(PageSize::from_bits).map(|s| s.bytes() as u64).collect();
        assert_eq!(sizes, [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10]);
        assert_eq!(PageSize::from_bytes(4097), None);
        assert_eq!(PageSize::from_bytes(0), None);
        assert_eq!(PageSize::from_bytes(128 << 10), None);
    }

    #[test]
    fn an_offset_inside_a_page_is_no_page() {
        assert_eq!(PageSize::KIB_16.page_at(BlockOffset(0x8000)), Some(PageIndex(2)));
        assert_eq!(PageSize::KIB_16.page_at(BlockOffset(0x9000)), None);
    }

    #[test]
    fn a_page_beyond_64_bits_has_no_offset() {
        assert_eq!(PageSize::KIB_4.offset_of(PageIndex(u64::MAX >> 12)), Some(BlockOffset(u64::MAX << 12)));
        assert_eq!(PageSize::KIB_4.offset_of(PageIndex(1 << 52)), None);
    }
}
