//! Captures a machine into a file.
//!
//! RAM goes directly to its places in a [`NewFile`] while the migration runs. Bitmaps, devices and head are written
//! when everything has arrived; then the file is synced and gets its name. If it is dropped before that, it is removed.

use std::{fs::File, path::Path, sync::Arc};

use indicatif::BinaryBytes;
use multifd::{
    Arrived, Error, Result,
    channel::Stop,
    ram::{BlockName, DirectFile, RamBlock, RamBlocks},
    wire::VmUuid,
};
use qemu_stream::{
    format::{BlockList, Configuration, SectionId},
    incoming::Loaded,
    mapped_ram::{Base, Layout, Shape, StoredMachine, Tail},
};
use rustix::fs::fstatvfs;

use crate::{
    about::About,
    direct_io::DirectIo,
    file_address::{Digests, FileAddress},
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
    /// What a delta is compared with.
    base: Option<Base>,
}

/// A file that is complete and has its name.
pub(crate) struct Complete {
    /// The blocks whose memory is shared and not in the file.
    pub(crate) ignored: Vec<BlockName>,
    /// The pages that are in the file, and all pages, if it is a delta.
    pub(crate) differing: Option<(u64, u64)>,
}

impl Capture {
    /// Creates a file that will appear at `address` and keeps the data before the address's offset.
    pub(crate) fn create(
        address: &FileAddress,
        force: bool,
        direct_io: &DirectIo<'_>,
        base: Option<&FileAddress>,
    ) -> Result<Self, While> {
        let offset = address.offset();
        // Opened first: if it is the file to be replaced, nothing may be changed.
        let base = base.map(|base| Ok::<_, While>((base, base.open(Digests::Compare)?))).transpose()?;
        let new = NewFile::create(address.path(), offset, force)?;
        let file = new.file().try_clone();
        let file = file.map_err(|error| While::new(format!("cannot create {address}"), error))?;
        let base = base.map(|(base, machine)| base_of(&machine, base, new.target())).transpose()?;
        let direct = direct_io.open(&file);
        Ok(Self { new, file: Arc::new(file), direct, offset, base })
    }

    /// Creates the machine's blocks, each at its place in the file.
    pub(crate) fn blocks(
        &self,
        configuration: Option<&Configuration>,
        list: &BlockList,
    ) -> Result<RamBlocks> {
        let layout = layout(&self.shape(configuration), list)?;
        if self.base.is_none() {
            warn_of_little_room(&self.file, self.new.target(), list.total());
        }
        // A full disk is reported when pages are written, so this makes a hole, not a reservation.
        let sized = self.file.set_len(layout.tail_offset());
        sized.map_err(|error| {
            Error::io(format!("cannot extend the file to {:#x} bytes", layout.tail_offset()), error)
        })?;
        match &self.base {
            None => layout.ram_blocks_with_digests(&self.file, self.direct.as_ref()),
            Some(base) => layout.ram_blocks_since(&self.file, self.direct.as_ref(), base),
        }
    }

    /// Writes everything but the pages, makes it durable and gives the file its name.
    pub(crate) fn complete(
        self,
        loaded: &Loaded,
        arrived: &Arrived,
        uuid: Option<VmUuid>,
        about: About,
        stop: &Stop,
    ) -> Result<Complete, While> {
        let failed =
            |error: Cause| While::new(format!("cannot complete {}", shown(self.new.target())), error);
        let blocks = arrived.blocks();
        let arranged = Layout::of_arrived(loaded, arrived, uuid, self.offset);
        let (laid, ignored) = arranged.map_err(|error| failed(error.into()))?;
        let about = about.complete();
        self.write(loaded, blocks, &laid, &about).map_err(|error| failed(error.into()))?;
        self.file.sync_all().map_err(|error| failed(error.into()))?;
        // This may take so long that a channel appears whose pages are missing.
        stop.check().map_err(|error| failed(error.into()))?;
        let differing = self.base.as_ref().map(|_| {
            let present = |block: &RamBlock| {
                block.present_words().map(|word| u64::from(word.count_ones())).sum::<u64>()
            };
            blocks.iter().fold((0, 0), |(some, all), (_, block)| (some + present(block), all + block.pages()))
        });
        self.new.name()?;
        let names = ignored.into_iter().filter_map(|index| Some(blocks.get(index)?.name().clone()));
        Ok(Complete { ignored: names.collect(), differing })
    }

    fn write(&self, loaded: &Loaded, blocks: &RamBlocks, laid: &Layout, about: &str) -> Result<u64> {
        let tail = Tail {
            switchover_start: loaded.switchover_start,
            devices: &loaded.devices,
            about: Some(about),
            base: self.base.as_ref().map(Base::name),
        };
        let written = laid.write_around(&self.file, blocks, &tail);
        written.map_err(|error| Error::other("cannot write the file", error))
    }

    /// The part of the layout that is known before RAM has arrived.
    fn shape<'a>(&self, configuration: Option<&'a Configuration>) -> Shape<'a> {
        let (section, ignored) = (SectionId(1), &[][..]);
        Shape { configuration, section, offset: self.offset, footers: true, ignored, sync_mode: None }
    }
}

/// The base of a delta at `target`.
fn base_of(machine: &StoredMachine, address: &FileAddress, target: &Path) -> Result<Base, While> {
    let unusable = |error: Cause| While::new(format!("cannot use {address} as a base"), error);
    let path = Base::relative(target, address.path()).map_err(|error| unusable(error.into()))?;
    let base = Base::new(machine, path).map_err(|error| unusable(error.into()))?;
    // It may be replaced by --force.
    match File::open(target) {
        Ok(replaced) if base.has(&replaced).map_err(|error| unusable(error.into()))? => {
            let why = format!(
                "{} is needed to read the delta that would replace it: use another name",
                shown(target)
            );
            Err(unusable(why.into()))
        }
        _ => Ok(base),
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Warns if there is little space for `ram` bytes. It is only a warning, because it is not known yet how much of RAM is zero, and
/// zero pages take no space.
pub(crate) fn warn_of_little_room(file: &File, target: &Path, ram: u64) {
    // A file system that does not report its space has nothing to compare with.
    let Ok(system) = fstatvfs(file) else { return };
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    if free < ram {
        tracing::warn!(
            "the file system of {} may become full: {} are free, and the guest has {} of RAM; zero pages take no space; \
             if the space is not enough, the migration fails",
            shown(target),
            BinaryBytes(free),
            BinaryBytes(ram),
        );
    }
}

fn layout(shape: &Shape<'_>, list: &BlockList) -> Result<Layout> {
    Layout::of(shape, list).map_err(|error| Error::other("cannot compute the layout of the file", error))
}
