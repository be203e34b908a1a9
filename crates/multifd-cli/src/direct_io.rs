//! `--direct-io`: the channels' pages go past the page cache, where that can be; where it cannot, why is said.

use std::{fs::File, sync::Arc};

use multifd::ram::{BlockName, DirectFile};

use crate::{file_address::FileAddress, output::outcome::say};

/// What was asked for, and of which file.
pub(crate) struct DirectIo<'a> {
    pub(crate) wanted: bool,
    pub(crate) quiet: bool,
    pub(crate) address: &'a FileAddress,
}

impl DirectIo<'_> {
    /// The way past the page cache, if it was asked for and there is one.
    pub(crate) fn open(&self, file: &File) -> Option<Arc<DirectFile>> {
        if !self.wanted {
            return None;
        }
        match DirectFile::of(file) {
            Ok(direct) => Some(Arc::new(direct)),
            Err(error) => {
                self.tell(&format!("{} uses the page cache: {error}", self.address));
                None
            }
        }
    }

    /// Tells of a block that lies where the way is closed.
    pub(crate) fn check(&self, direct: &DirectFile, name: &BlockName, offset: u64) {
        let alignment = direct.offset_alignment();
        if !offset.is_multiple_of(alignment) {
            self.tell(&format!(
                "block {name:?} uses the page cache: it begins at {offset:#x}, expected a multiple of {alignment:#x}"
            ));
        }
    }

    /// Tells of pages that main carries.
    pub(crate) fn without_channels(&self) {
        if self.wanted {
            self.tell("pages on the main connection use the page cache; switch multifd on to send pages over channels");
        }
    }

    fn tell(&self, what: &str) {
        if !self.quiet {
            say(&format!("direct-io: {what}"));
        }
    }
}
