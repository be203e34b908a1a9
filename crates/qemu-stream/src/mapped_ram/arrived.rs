//! The layout of a machine that has arrived from a source.

use multifd::{Arrived, wire::VmUuid};

use super::{Layout, Shape};
use crate::{
    error::Error,
    format::{BlockIndex, Configuration},
    incoming::Loaded,
};

impl Layout {
    /// The layout for a machine that has arrived, from `offset` of a file on, and the blocks that are not in it, because their memory
    /// is shared. `uuid` is what the channels have named; `None` if there were none.
    ///
    /// Its pages are where they are without `uuid`, and with any other section and any footers: so they can have been written to
    /// their places before.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn of_arrived(
        loaded: &Loaded,
        arrived: &Arrived,
        uuid: Option<VmUuid>,
        offset: u64,
    ) -> Result<(Self, Vec<BlockIndex>), Error> {
        let configuration = loaded.configuration.as_ref();
        let ignored = ignored(configuration, arrived);
        let shape = Shape {
            configuration,
            section: loaded.section,
            offset,
            footers: loaded.footers,
            ignored: &ignored,
            sync_mode: uuid.map(|_| loaded.sync_mode),
        };
        let mut laid = Self::of(&shape, &loaded.blocks)?;
        // The channels send the machine's UUID. The file can store it, if its pages stay in place.
        if let (Some(plain), Some(uuid)) = (configuration, uuid.filter(|uuid| !uuid.is_nil()))
            && plain.uuid.is_none()
        {
            let named = Configuration { uuid: Some(uuid), ..plain.clone() };
            let with_uuid = Self::of(&Shape { configuration: Some(&named), ..shape }, &loaded.blocks)?;
            if places(&with_uuid) == places(&laid) {
                laid = with_uuid;
            }
        }
        Ok((laid, ignored))
    }
}

/// The shared blocks. With x-ignore-shared, the only sign of a shared block is that none of its pages has arrived.
fn ignored(configuration: Option<&Configuration>, arrived: &Arrived) -> Vec<BlockIndex> {
    if !configuration.is_some_and(|configuration| configuration.ignore_shared) {
        return Vec::new();
    }
    let blocks = arrived.blocks().iter();
    let untouched = blocks.filter(|(index, block)| block.pages() > 0 && arrived.is_untouched(*index));
    untouched.map(|(index, _)| index).collect()
}

fn places(layout: &Layout) -> Vec<u64> {
    layout.places().iter().map(|place| place.pages_offset).chain([layout.tail_offset()]).collect()
}
