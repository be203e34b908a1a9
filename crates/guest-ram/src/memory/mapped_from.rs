//! Whether the memory of a block is a part of a file.

use std::{fs::File, os::unix::fs::MetadataExt};

use rustix::fs::{major, minor};

use super::areas::Areas;
use crate::{Error, RamBlock};

impl RamBlock {
    /// Checks that the block's memory is mapped shared from `file`, with its first byte at `offset`: then another process
    /// that maps the same part has the same memory.
    ///
    /// # Errors
    /// [`Error::OtherMemory`] if it is not, or if the system does not say what is mapped (`/proc/self/maps`).
    pub fn check_mapped_from(&self, file: &File, offset: u64) -> Result<(), Error> {
        let other = |why: String| Error::OtherMemory { name: self.name().clone(), offset, why };
        let Some(range) = self.addresses() else {
            return Err(other("it is not mapped".into()));
        };
        let areas = Areas::without_flags(std::slice::from_ref(&range));
        let areas = areas.map_err(|error| other(format!("what is mapped cannot be read: {error}")))?;
        let found = file.metadata().map_err(|error| other(error.to_string()))?;
        let id = (major(found.dev()), minor(found.dev()), found.ino());
        let page = rustix::param::page_size() as u64;
        if !offset.is_multiple_of(page) {
            return Err(other("the offset is within a page".into()));
        }
        for (part, area) in areas.parts(&range) {
            let at = part.start - range.start;
            let Some(area) = area else { return Err(other(format!("nothing is mapped at {at:#x}"))) };
            if area.file != id {
                return Err(other(format!("it is of another file at {at:#x}")));
            }
            if !area.shared {
                return Err(other(format!(
                    "it is a private mapping at {at:#x}, which the file does not see"
                )));
            }
            let there = area.offset + (part.start - area.range.start);
            if there != offset + at {
                return Err(other(format!("at {at:#x}, it is the file at {there:#x}")));
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::{Access, BlockName, Mapping, Memory, PageSize};

    fn file() -> File {
        let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(16 << 12).expect("sized");
        file
    }

    fn block(memory: Mapping) -> RamBlock {
        let name = BlockName::new("ram").expect("a name");
        RamBlock::new(name, 3 << 12, PageSize::KIB_4, Memory::Mapped(memory)).expect("a block")
    }

    #[test]
    fn block_is_the_part_of_the_file_that_is_mapped_and_no_other() {
        let file = file();
        let of_file = block(Mapping::of_file(&file, 2 << 12, 3 << 12, Access::ReadWrite).expect("mapped"));
        assert_eq!(of_file.check_mapped_from(&file, 2 << 12), Ok(()));
        // The same file by another descriptor.
        assert_eq!(of_file.check_mapped_from(&file.try_clone().expect("a descriptor"), 2 << 12), Ok(()));
        let anonymous = block(Mapping::anonymous(3 << 12).expect("mapped"));
        for (block, file, offset, expected) in [
            (&of_file, &file, 3 << 12, "at 0x0, it is the file at 0x2000"),
            (&of_file, &file, (2 << 12) + 1, "the offset is within a page"),
            (&of_file, &self::file(), 2 << 12, "it is of another file at 0x0"),
            (&anonymous, &file, 0, "it is of another file at 0x0"),
        ] {
            let error = block.check_mapped_from(file, offset).expect_err(expected).to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
