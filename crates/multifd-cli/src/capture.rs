//! A captured machine on its way into a file.
//!
//! RAM goes straight to its places in a [`NewFile`] while the migration runs; bitmaps, devices and head are written
//! when everything has come, then it is synced and gets its name. Dropped before that, it is removed.

use std::{fs::File, sync::Arc};

use multifd::{
    Error, Result,
    channel::Stop,
    ram::{Memory, RamBlock, RamBlocks},
    wire::VmUuid,
};
use qemu_stream::{
    format::{BlockIndex, BlockList, Configuration, SectionId},
    incoming::Loaded,
    mapped_ram::{Layout, Tail},
};

use crate::{file_address::FileAddress, new_file::NewFile, outcome::While};

/// A file that holds nothing valid yet.
pub(crate) struct Capture {
    new: NewFile,
    file: Arc<File>,
    /// Where the machine's stream begins in it.
    offset: u64,
}

impl Capture {
    /// A file that will appear at `address`, which keeps what stands before the address's offset.
    pub(crate) fn create(address: &FileAddress, force: bool) -> Result<Self, While> {
        let offset = address.offset();
        let new = NewFile::create(address.path(), offset, force)?;
        let file = new.file().try_clone();
        let file = file.map_err(|error| While::new(format!("cannot create {address}"), error))?;
        Ok(Self { new, file: Arc::new(file), offset })
    }

    /// The machine's blocks, each at its place in the file.
    pub(crate) fn blocks(
        &self,
        configuration: Option<&Configuration>,
        list: &BlockList,
    ) -> Result<RamBlocks> {
        let configuration =
            configuration.ok_or_else(|| refused("a machine type up to 2.3 has no configuration"))?;
        if configuration.ignore_shared {
            return Err(refused("its shared RAM does not travel: switch x-ignore-shared off at the source"));
        }
        let layout = self.layout(configuration, list, SectionId(1))?;
        // A full disk is to be found when pages are written, so this makes a hole, not a reservation.
        let sized = self.file.set_len(layout.tail_offset());
        sized.map_err(|error| {
            Error::io(format!("extend the file to {:#x} bytes", layout.tail_offset()), error)
        })?;
        let blocks = list.entries().iter().zip(layout.places()).map(|(entry, place)| {
            let memory = Memory::File { file: self.file.clone(), offset: place.pages_offset };
            RamBlock::fresh(entry.name.clone(), entry.used_length, list.page_size(), memory)
        });
        RamBlocks::new(blocks.collect::<Result<_>>()?)
    }

    /// Writes everything but the pages, makes it durable and gives the file its name.
    pub(crate) fn complete(
        self,
        loaded: &Loaded,
        blocks: &RamBlocks,
        uuid: Option<VmUuid>,
        stop: &Stop,
    ) -> Result<(), While> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            While::new(format!("cannot complete {}", self.new.target().display()), error)
        };
        self.write(loaded, blocks, uuid).map_err(|error| failed(error.into()))?;
        self.file.sync_all().map_err(|error| failed(error.into()))?;
        // That can take long enough for a channel to turn up whose pages are missing.
        stop.check().map_err(|error| failed(error.into()))?;
        self.new.name()
    }

    fn write(&self, loaded: &Loaded, blocks: &RamBlocks, uuid: Option<VmUuid>) -> Result<u64> {
        let plain = loaded.configuration.clone().ok_or_else(|| refused("it has no configuration"))?;
        let mut laid = self.layout(&plain, &loaded.blocks, loaded.section)?;
        // The channels name the machine's UUID, which the file can keep, if its pages stay where they are.
        if let (None, Some(uuid)) = (plain.uuid, uuid.filter(|uuid| !uuid.is_nil())) {
            let named = Configuration { uuid: Some(uuid), ..plain };
            let with_uuid = self.layout(&named, &loaded.blocks, loaded.section)?;
            if places(&with_uuid) == places(&laid) {
                laid = with_uuid;
            }
        }
        let written = || -> Result<u64, qemu_stream::Error> {
            laid.write_head(&self.file)?;
            for (index, block) in blocks.iter() {
                let words: Vec<u64> = block.present().words().collect();
                laid.write_bitmap(&self.file, BlockIndex(index.0), &words)?;
            }
            let tail = Tail { switchover_start: loaded.switchover_start, devices: &loaded.devices };
            laid.write_tail(&self.file, &tail)
        };
        written().map_err(|error| Error::other("write the file", error))
    }

    fn layout(&self, configuration: &Configuration, list: &BlockList, section: SectionId) -> Result<Layout> {
        Layout::new(configuration, list, section, self.offset)
            .map_err(|error| Error::other("lay the file out", error))
    }
}

fn places(layout: &Layout) -> Vec<u64> {
    layout.places().iter().map(|place| place.pages_offset).chain([layout.tail_offset()]).collect()
}

fn refused(why: &'static str) -> Error {
    Error::other("this machine cannot be kept in a mapped-ram file", why)
}
