//! The identity of a machine's blocks, to check that two parts of a migration were made for the same blocks.

use std::io;

use crate::{BlockName, Error, PageSize, RamBlocks};

/// Names, lengths, page sizes and locations of blocks, in order.
#[derive(Clone, Debug)]
pub struct Identity(Vec<Block>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    name: BlockName,
    used_length: u64,
    page_size: PageSize,
    /// See `RamBlock::range`.
    range: Option<(usize, u64, u64)>,
}

impl RamBlocks {
    /// The identity of these blocks. A log keeps it and [compares](Identity::check) it when it is read.
    pub fn identity(&self) -> Identity {
        let blocks = self.iter().map(|(_, block)| Block {
            name: block.name().clone(),
            used_length: block.used_length(),
            page_size: block.page_size(),
            range: block.range(),
        });
        Identity(blocks.collect())
    }
}

impl Identity {
    /// Checks that `found` are these blocks: the same names, lengths and pages, in the same order, over the same bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`], with [`Error::NotTheseBlocks`] and the first difference.
    pub fn check(&self, found: &RamBlocks) -> io::Result<()> {
        self.difference(found)
            .map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, Error::NotTheseBlocks { why }))
    }

    fn difference(&self, found: &RamBlocks) -> Result<(), String> {
        if self.0.len() != found.len() {
            return Err(format!("expected {} blocks, found {}", self.0.len(), found.len()));
        }
        for (index, (expected, found)) in self.0.iter().zip(found.identity().0).enumerate() {
            let name = &expected.name;
            if *name != found.name {
                return Err(format!("block {index} is {:?}, expected {name:?}", found.name));
            }
            if (expected.used_length, expected.page_size) != (found.used_length, found.page_size) {
                let (expected, found) = (expected.used_length, found.used_length);
                return Err(format!("block {name:?} has {found:#x} bytes, expected {expected:#x}"));
            }
            if expected.range != found.range {
                return Err(format!("block {name:?} has other memory"));
            }
        }
        Ok(())
    }
}
