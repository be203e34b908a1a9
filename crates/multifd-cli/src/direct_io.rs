//! `--direct-io`: the channels' pages bypass the page cache if possible; if not, a message says why.

use std::{fs::File, sync::Arc};

use multifd::ram::{BlockName, DirectFile};

use crate::{file_address::FileAddress, output::outlet::say};

/// The requested direct I/O, and the file it is for.
pub(crate) struct DirectIo<'a> {
    pub(crate) wanted: bool,
    pub(crate) quiet: bool,
    pub(crate) address: &'a FileAddress,
}

impl DirectIo<'_> {
    /// Opens the file for direct I/O, if that was requested and is possible.
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

    /// Warns of a block whose position does not allow direct I/O.
    pub(crate) fn check(&self, direct: &DirectFile, name: &BlockName, offset: u64) {
        let alignment = direct.offset_alignment();
        if !offset.is_multiple_of(alignment) {
            self.tell(&format!(
                "block {name:?} uses the page cache: it begins at {offset:#x}, expected a multiple of {alignment:#x}"
            ));
        }
    }

    /// Warns that pages over main do not use direct I/O.
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
