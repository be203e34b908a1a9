//! Which parts of a file are holes, as far as the file system knows.

use std::{fs::File, ops::Range};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Looks for holes in a file from its beginning to its end. It moves the position of the descriptor, which nothing here uses.
pub(super) struct Holes<'a> {
    file: &'a File,
    data: Range<u64>,
    hole: Range<u64>,
    is_supported: bool,
}

impl<'a> Holes<'a> {
    pub(super) fn of(file: &'a File) -> Self {
        Self { file, data: 0..0, hole: 0..0, is_supported: true }
    }

    /// Whether all of these bytes are in a hole, and so are zeros. `false` if that is not known.
    pub(super) fn has(&mut self, bytes: &Range<u64>) -> bool {
        if !self.is_supported {
            return false;
        }
        let within = |outer: &Range<u64>| outer.start <= bytes.start && bytes.end <= outer.end;
        if within(&self.hole) || (self.data.start <= bytes.start && bytes.start < self.data.end) {
            return within(&self.hole);
        }
        match seek(self.file, SeekFrom::Data(bytes.start)) {
            Ok(data) => {
                self.hole = bytes.start..data.max(bytes.start);
                // Without an end the rest is data.
                let end = seek(self.file, SeekFrom::Hole(data)).unwrap_or(u64::MAX);
                self.data = data..end;
            }
            // Nothing follows but a hole.
            Err(Errno::NXIO) => self.hole = bytes.start..u64::MAX,
            Err(_) => self.is_supported = false,
        }
        self.is_supported && self.hole.start <= bytes.start && bytes.end <= self.hole.end
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_are_found_between_data_and_at_the_end() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(16 << 20).expect("sized");
        for at in [4_u64 << 20, 8 << 20] {
            file.write_all_at(&[1; 4096], at).expect("written");
        }
        let mut holes = Holes::of(&file);
        for (start, is_hole) in
            [(0, true), (4 << 20, false), ((4 << 20) + 65536, true), (8 << 20, false), (12 << 20, true)]
        {
            assert_eq!(holes.has(&(start..start + 4096)), is_hole, "{start:#x}");
        }
        assert!(!holes.has(&(0..16 << 20)), "data among them");
    }
}
