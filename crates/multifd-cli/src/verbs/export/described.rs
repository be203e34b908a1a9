//! The processors and the kernel of a guest, as notes.

use std::ops::Range;

/// What a file says besides memory.
pub(super) struct Described {
    /// Notes of the processors, and that of the kernel.
    pub(super) notes: Vec<u8>,
    /// Where the kernel's own description is in the notes.
    pub(super) vmcoreinfo: Option<Range<u64>>,
    pub(super) processors: u32,
}

impl Described {
    /// The rest of the first line of VMCOREINFO that begins with `key`.
    pub(super) fn text(&self, key: &str) -> Option<String> {
        let Range { start, end } = self.vmcoreinfo.clone()?;
        let text = self.notes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)?;
        let mut lines = text.split(|byte| *byte == b'\n');
        let value = lines.find_map(|line| line.strip_prefix(key.as_bytes()))?;
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// The same, as a number. A negative one is that of 64 bits.
    pub(super) fn value(&self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        text.parse().ok().or_else(|| text.parse::<i64>().ok().map(i64::cast_unsigned))
    }
}
