//! Captures a machine into a file.
//!
//! RAM goes directly to its places in a [`NewFile`] while the migration runs. Bitmaps, devices and head are written
//! when everything has arrived; then the file is synced and gets its name. If it is dropped before that, it is removed.

use std::{fs::File, sync::Arc};

use indicatif::BinaryBytes;
use multifd::{
    Arrived, Error, Result,
    channel::Stop,
    ram::{BlockName, DirectFile, RamBlocks},
    wire::VmUuid,
};
use qemu_stream::{
    format::{BlockIndex, BlockList, Configuration, SectionId},
    incoming::Loaded,
    mapped_ram::{Layout, Shape, Tail},
};
use rustix::fs::fstatvfs;

use crate::{
    about::About,
    direct_io::DirectIo,
    file_address::FileAddress,
    new_file::NewFile,
    output::{outcome::While, outlet::shown},
};

/// A file that contains nothing valid yet.
pub(crate) struct Capture {
    new: NewFile,
    file: Arc<File>,
    direct: Option<Arc<DirectFile>>,
    /// The position at which the machine's stream begins in the file.
    offset: u64,
}

impl Capture {
    /// Creates a file that will appear at `address` and keeps the data before the address's offset.
    pub(crate) fn create(
        address: &FileAddress,
        force: bool,
        direct_io: &DirectIo<'_>,
    ) -> Result<Self, While> {
        let offset = address.offset();
        let new = NewFile::create(address.path(), offset, force)?;
        let file = new.file().try_clone();
        let file = file.map_err(|error| While::new(format!("cannot create {address}"), error))?;
        let direct = direct_io.open(&file);
        Ok(Self { new, file: Arc::new(file), direct, offset })
    }

    /// Creates the machine's blocks, each at its place in the file.
    pub(crate) fn blocks(
        &self,
        configuration: Option<&Configuration>,
        list: &BlockList,
    ) -> Result<RamBlocks> {
        let layout = layout(&self.shape(configuration), list)?;
        self.warn_of_little_room(list.total());
        // A full disk is reported when pages are written, so this makes a hole, not a reservation.
        let sized = self.file.set_len(layout.tail_offset());
        sized.map_err(|error| {
            Error::io(format!("cannot extend the file to {:#x} bytes", layout.tail_offset()), error)
        })?;
        layout.ram_blocks_with_digests(&self.file, self.direct.as_ref())
    }

    /// Warns if there is little space. It is only a warning, because it is not known yet how much of RAM is zero, and
    /// zero pages take no space.
    fn warn_of_little_room(&self, ram: u64) {
        // A file system that does not report its space has nothing to compare with.
        let Ok(system) = fstatvfs(&self.file) else { return };
        let free = system.f_bavail.saturating_mul(system.f_frsize);
        if free < ram {
            tracing::warn!(
                "the file system of {} may become full: {} are free, and the guest has {} of RAM; zero pages take no space; \
                 if the space is not enough, the migration fails",
                shown(self.new.target()),
                BinaryBytes(free),
                BinaryBytes(ram),
            );
        }
    }

    /// Writes everything but the pages, makes it durable and gives the file its name. Returns the blocks whose memory
    /// is shared and not in the file.
    pub(crate) fn complete(
        self,
        loaded: &Loaded,
        arrived: &Arrived,
        channels: &Channels,
        about: About,
        stop: &Stop,
    ) -> Result<Vec<BlockName>, While> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            While::new(format!("cannot complete {}", shown(self.new.target())), error)
        };
        let blocks = arrived.blocks();
        let ignored = ignored(loaded.configuration.as_ref(), arrived);
        let about = about.complete();
        self.write(loaded, blocks, &ignored, channels, &about).map_err(|error| failed(error.into()))?;
        self.file.sync_all().map_err(|error| failed(error.into()))?;
        // This may take so long that a channel appears whose pages are missing.
        stop.check().map_err(|error| failed(error.into()))?;
        self.new.name()?;
        Ok(ignored.into_iter().filter_map(|index| Some(blocks.get(index)?.name().clone())).collect())
    }

    fn write(
        &self,
        loaded: &Loaded,
        blocks: &RamBlocks,
        ignored: &[BlockIndex],
        channels: &Channels,
        about: &str,
    ) -> Result<u64> {
        let plain = loaded.configuration.as_ref();
        let shape = Shape {
            section: loaded.section,
            footers: loaded.footers,
            ignored,
            sync_mode: channels.any.then_some(loaded.sync_mode),
            ..self.shape(plain)
        };
        let mut laid = layout(&shape, &loaded.blocks)?;
        // The channels send the machine's UUID. The file can store it, if its pages stay in place.
        if let (Some(plain), Some(uuid)) = (plain, channels.uuid.filter(|uuid| !uuid.is_nil()))
            && plain.uuid.is_none()
        {
            let named = Configuration { uuid: Some(uuid), ..plain.clone() };
            let with_uuid = layout(&Shape { configuration: Some(&named), ..shape.clone() }, &loaded.blocks)?;
            if places(&with_uuid) == places(&laid) {
                laid = with_uuid;
            }
        }
        let tail =
            Tail { switchover_start: loaded.switchover_start, devices: &loaded.devices, about: Some(about) };
        let written = laid.write_around(&self.file, blocks, &tail);
        written.map_err(|error| Error::other("cannot write the file", error))
    }

    /// The part of the layout that is known before RAM has arrived.
    fn shape<'a>(&self, configuration: Option<&'a Configuration>) -> Shape<'a> {
        let (section, ignored) = (SectionId(1), &[][..]);
        Shape { configuration, section, offset: self.offset, footers: true, ignored, sync_mode: None }
    }
}

/// What the channels have reported besides pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Channels {
    /// Whether there were channels: without them, the sync mode is unknown.
    pub(crate) any: bool,
    /// The machine's UUID.
    pub(crate) uuid: Option<VmUuid>,
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

fn layout(shape: &Shape<'_>, list: &BlockList) -> Result<Layout> {
    Layout::of(shape, list).map_err(|error| Error::other("cannot compute the layout of the file", error))
}

fn places(layout: &Layout) -> Vec<u64> {
    layout.places().iter().map(|place| place.pages_offset).chain([layout.tail_offset()]).collect()
}
