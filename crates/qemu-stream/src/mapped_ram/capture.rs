//! Captures a machine from this process's memory into a mapped-ram file.
//!
//! ```text
//! Migration ── passes ──▶ Sender::set_up_into(Capture::blocks) ── N channels ──▶ pages at their places
//!     └─ Main ──▶ Capture ── devices stored ── complete: head, bitmaps, tail [, fsync]
//! ```
//!
//! Pages are written while the guest runs, but the file is not valid before [`complete`](Main::complete): an
//! interrupted file has no head, and no reader loads it.
//!
//! The limit of a file's size is checked before the file is changed. It may still be reached later, by devices larger
//! than the remaining space or because it is lowered. Then the write fails and the guest continues: `SIGXFSZ` is
//! blocked in the thread that writes while it writes.

use std::{fs::File, sync::Arc};

use multifd::{
    Error, Result, Synced,
    channel::{Stop, Wake},
    live::{DeviceInfo, DeviceSection, Main, Pass, RunState, Verdict},
    ram::{BlockIndex, LogMark, PageIndex, RamBlock, RamBlocks, with_file_size_errors},
};

use super::{
    Base, Captured, Layout, Shape, StoredMachine, Tail,
    access::{direct, within_limit},
    appendix::Written,
};
use crate::{
    embedder::{check_devices, devices_of, list_of},
    error::Usage,
    format::{BlockList, Configuration, DevicePart, SectionId, SyncMode},
};

/// How a file is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct CaptureOptions {
    offset: u64,
    direct_io: Option<bool>,
    durable: bool,
    digests: Option<bool>,
    about: Option<String>,
}

impl CaptureOptions {
    /// The default options: a separate file, through the page cache, without a sync at the end.
    pub fn new() -> Self {
        Self::default()
    }

    /// The offset in bytes at which the machine begins in the file. Default 0. Data before it is not changed; data
    /// after it is lost at once.
    pub fn offset(mut self, bytes: u64) -> Self {
        self.offset = bytes;
        self
    }

    /// `direct-io`: whether channels bypass the page cache and write directly from guest memory. By default a
    /// [durable](Self::durable) capture does, because its data reaches the disk sooner and with a tenth of the CPU
    /// time. Other captures do not, because writing only into the cache is faster. If the file system does not support
    /// it, the log says so and the cache is used.
    pub fn direct_io(mut self, on: bool) -> Self {
        self.direct_io = Some(on);
        self
    }

    /// Whether a digest of every page is stored behind the machine, so that [`Verify`](super::Verify) and every reader find
    /// damage. It takes 16 bytes of memory and of the file for each page. Default on for a [durable](Self::durable) capture, where
    /// the disk is slower than the digests, and off for others: into a file in memory they take a part of the time.
    pub fn digests(mut self, on: bool) -> Self {
        self.digests = Some(on);
        self
    }

    /// What is recorded about the capture behind the machine, as JSON, at most 1 MiB: for
    /// [`StoredMachine::about`]. Default nothing.
    pub fn about(mut self, text: impl Into<String>) -> Self {
        self.about = Some(text.into());
        self
    }

    /// Whether the file is on the disk (`fsync`) when the capture is complete; the guest is stopped until then. Default
    /// off, as in QEMU. The caller must sync the file's entry in its folder.
    pub fn durable(mut self, on: bool) -> Self {
        self.durable = on;
        self
    }
}

/// A mapped-ram file that is being written: the [`Main`] of a migration into a file.
///
/// The [`Sender`](multifd::Sender) of the migration is set up into its [`blocks`](Capture::blocks). Without a sender,
/// this type writes the pages one by one. When [`Migration::run`](multifd::live::Migration::run) has returned `Ok`, the
/// file is complete and the guest is stopped. It may continue here if it [ran](multifd::live::MigrationInfo::guest_was)
/// before, because nothing else runs it.
#[derive(Debug)]
pub struct Capture {
    file: Arc<File>,
    blocks: Arc<RamBlocks>,
    machine: Machine,
    /// For each of the migration's blocks, its index in the file.
    order: Vec<BlockIndex>,
    offset: u64,
    durable: bool,
    about: Option<String>,
    bytes: u64,
    base: Option<Base>,
    /// The state of the dirty log that is in the file.
    mark: Option<LogMark>,
    captured: Option<Captured>,
}

/// The contents of the file besides RAM.
#[derive(Debug)]
pub(super) struct Machine {
    configuration: Option<Configuration>,
    list: BlockList,
    section: SectionId,
    ignored: Vec<BlockIndex>,
    sync_mode: Option<SyncMode>,
    switchover_start: bool,
    footers: bool,
    /// The devices: those of a captured machine, or the guest's after its stop.
    devices: Option<DevicePart>,
    replayed: bool,
}

impl Capture {
    /// Creates a capture of a running machine with these blocks, whose devices come from its guest. `file` is open for
    /// writing; its contents from the offset on are lost.
    ///
    /// # Errors
    /// If the configuration is too old for such files or does not fit the blocks, or the file cannot be extended;
    /// [`Usage::FileSize`] as the cause if the process may not make a file so long.
    pub fn of_guest(
        file: File,
        configuration: Configuration,
        blocks: &RamBlocks,
        options: &CaptureOptions,
    ) -> Result<Self> {
        let machine = Machine::of_guest(configuration, blocks)?;
        Self::begin_at(file, machine, options, None)
    }

    /// Creates a capture of a running machine that stores only the pages that differ from `base`: a *delta*. Like
    /// [`of_guest`](Self::of_guest) otherwise. It always has digests. No reader takes it for a whole machine;
    /// [`StoredMachine::open`] opens it with its bases, and [`Merge`](super::Merge) makes a whole machine of them.
    ///
    /// Without a dirty log that was kept, all memory is read and compared. With one ([`Base::with_log`]), only what was written
    /// since the base was captured is read; the migration must then be run with that [`KeptLog`](multifd::ram::KeptLog).
    ///
    /// # Errors
    /// As [`of_guest`](Self::of_guest); also if `file` is a file of the base, which would be lost, or if the pages of the base
    /// have another size.
    pub fn since(
        base: &Base,
        file: File,
        configuration: Configuration,
        blocks: &RamBlocks,
        options: &CaptureOptions,
    ) -> Result<Self> {
        let refused = |error| Error::other("capture what differs from the base", error);
        base.check_beside(&file).map_err(refused)?;
        let machine = Machine::of_guest(configuration, blocks)?;
        Self::begin_at(file, machine, options, Some(base.clone()))
    }

    /// What was captured, as the [base](Base::with_log) of the next capture; `None` before the file is complete, and for a
    /// file without [digests](CaptureOptions::digests).
    pub fn captured(&self) -> Option<&Captured> {
        self.captured.as_ref()
    }

    /// Creates a capture of a machine that was [restored](super::Restore) from another file, including changes to its
    /// RAM. Block list and devices are written unchanged. The devices that its guest returns after its stop are
    /// dropped.
    ///
    /// # Errors
    /// As [`of_guest`](Self::of_guest).
    pub fn of_machine(file: File, machine: &StoredMachine, options: &CaptureOptions) -> Result<Self> {
        Self::begin_at(file, Machine::stored(machine), options, None)
    }

    fn begin_at(file: File, machine: Machine, options: &CaptureOptions, base: Option<Base>) -> Result<Self> {
        let &CaptureOptions { offset, direct_io, durable, digests, .. } = options;
        let layout = machine.layout(offset)?;
        let end = layout.tail_offset();
        // Checked before anything in the file is lost.
        within_limit(end).map_err(|error| Error::other("create the layout of the file", error))?;
        // This comes first: an older machine in the file must not be mistaken for a complete one.
        with_file_size_errors(|| file.set_len(offset).and_then(|()| file.set_len(end)))
            .map_err(|error| Error::io(format!("extend the file to {end:#x} bytes"), error))?;
        let direct = if direct_io.unwrap_or(durable) { direct(&file) } else { None };
        let file = Arc::new(file);
        let blocks = if let Some(base) = &base {
            layout.ram_blocks_since(&file, direct.as_ref(), base)
        } else if digests.unwrap_or(durable) {
            layout.ram_blocks_with_digests(&file, direct.as_ref())
        } else {
            layout.ram_blocks(&file, direct.as_ref())
        };
        let blocks = Arc::new(blocks?);
        let order = blocks.iter().map(|(index, _)| index).collect();
        let about = options.about.clone();
        let (mark, captured) = (None, None);
        Ok(Self { file, blocks, machine, order, offset, durable, about, bytes: 0, base, mark, captured })
    }

    /// The blocks in the file, into which a [`Sender`](multifd::Sender) is [set up](multifd::Sender::set_up_into).
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// The file, for example to give it its name.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// For each of the migration's blocks, its index in the file.
    #[cfg(feature = "fault")]
    pub(super) fn order(&self) -> &[BlockIndex] {
        &self.order
    }

    /// Whether it stores only what differs from a base.
    #[cfg(feature = "fault")]
    pub(super) fn has_base(&self) -> bool {
        self.base.is_some()
    }

    /// Truncates the file where the machine begins, so that it contains none.
    pub(super) fn discard(&self) {
        if let Err(error) = self.file.set_len(self.offset) {
            tracing::warn!(%error, "the incomplete file could not be truncated");
        }
    }

    fn block(&self, block: BlockIndex) -> Result<&RamBlock> {
        Ok(self.blocks.block(self.order.get(block.0).copied().unwrap_or(block))?)
    }

    fn write(&mut self) -> Result<u64> {
        let layout = self.machine.layout(self.offset)?;
        let Some(devices) = &self.machine.devices else {
            return Err(Error::other("complete the file", "the guest has not been stopped"));
        };
        let tail = Tail {
            switchover_start: self.machine.switchover_start,
            devices,
            about: self.about.as_deref(),
            base: self.base.as_ref().map(Base::name),
        };
        let written = layout.write_with_root(&self.file, &self.blocks, &tail);
        let Written { end, root } = written.map_err(|error| Error::other("complete the file", error))?;
        if self.durable {
            self.file.sync_all().map_err(|error| Error::io("write the file to the disk", error))?;
        }
        self.captured = root.map(|root| Captured { root, mark: self.mark });
        Ok(end)
    }
}

impl Machine {
    /// The machine of other files, unchanged.
    pub(super) fn stored(machine: &StoredMachine) -> Self {
        let ignored = |(index, _)| machine.is_ignored(index).then_some(index);
        Self {
            configuration: machine.configuration().cloned(),
            list: machine.blocks().clone(),
            section: machine.section(),
            ignored: machine.blocks().iter().filter_map(ignored).collect(),
            sync_mode: machine.sync_mode(),
            switchover_start: machine.switchover_start(),
            footers: machine.devices().has_footers(),
            devices: Some(machine.devices().clone()),
            replayed: true,
        }
    }

    fn of_guest(configuration: Configuration, blocks: &RamBlocks) -> Result<Self> {
        if !configuration.machine.has_footers() {
            let machine = configuration.machine;
            let error = Usage::Machine {
                machine,
                why: "has no configuration, so it cannot have capability mapped-ram",
            };
            return Err(Error::other("create the layout of the file", error));
        }
        let list = list_of(blocks).map_err(|error| Error::other("list the blocks", error))?;
        let ignored = blocks.iter().filter(|(_, block)| block.is_ignored()).map(|(index, _)| index).collect();
        Ok(Self {
            list,
            section: SectionId(1),
            ignored,
            sync_mode: None,
            switchover_start: configuration.machine.has_switchover_start(),
            footers: true,
            configuration: Some(configuration),
            devices: None,
            replayed: false,
        })
    }

    pub(super) fn layout(&self, offset: u64) -> Result<Layout> {
        let shape = Shape {
            configuration: self.configuration.as_ref(),
            section: self.section,
            offset,
            footers: self.footers,
            ignored: &self.ignored,
            sync_mode: self.sync_mode,
        };
        Layout::of(&shape, &self.list).map_err(|error| Error::other("create the layout of the file", error))
    }
}

impl Main for Capture {
    fn expect(&mut self, devices: &[DeviceInfo]) -> Result<()> {
        if self.machine.replayed {
            return Ok(());
        }
        let page_size = self.blocks.page_size().bytes();
        let checked = check_devices(devices, page_size, self.machine.section);
        checked.map_err(|error| Error::other("list the devices", error))
    }

    fn since(&self) -> Option<LogMark> {
        self.base.as_ref()?.mark()
    }

    fn marked(&mut self, mark: LogMark) {
        self.mark = Some(mark);
    }

    fn begin(&mut self, _channels: u8) -> Result<()> {
        Ok(())
    }

    fn setup(&mut self, blocks: &RamBlocks, _: Option<Synced<'_>>) -> Result<()> {
        let find = |(_, block): (BlockIndex, &RamBlock)| {
            let index = self.blocks.find(block.name().as_bytes())?;
            self.blocks.get(index).filter(|of| of.used_length() == block.used_length()).map(|_| index)
        };
        let order: Option<Vec<_>> = blocks.iter().map(find).collect();
        let order = order.filter(|order| order.len() == self.blocks.len());
        self.order =
            order.ok_or_else(|| Error::other("find the blocks", "the file was created for other blocks"))?;
        Ok(())
    }

    fn begin_pass(&mut self, _: Pass) -> Result<()> {
        Ok(())
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.block(block)?.clear(page);
        Ok(())
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        let block = self.block(block)?;
        block.store(page, bytes).map_err(|error| {
            let offset = block.offset_of(page).map_or(u64::MAX, |offset| offset.0);
            Error::io(format!("write block {:?} at offset {offset:#x}", block.name()), error)
        })?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn end_pass(&mut self, _: Pass, _: Option<Synced<'_>>) -> Result<()> {
        Ok(())
    }

    fn switchover(&mut self) -> Result<()> {
        Ok(())
    }

    /// There is no peer to wait for.
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }

    fn end_ram(&mut self, _: Option<Synced<'_>>) -> Result<()> {
        Ok(())
    }

    fn devices(&mut self, devices: Vec<DeviceSection>, guest: RunState) -> Result<()> {
        if !self.machine.replayed {
            let page_size = self.blocks.page_size().bytes();
            let part = devices_of(devices, guest, page_size, self.machine.section);
            self.machine.devices = Some(part.map_err(|error| Error::other("list the devices", error))?);
        }
        Ok(())
    }

    /// Writes everything but the pages, and syncs the file to the disk if that was requested. If it fails, or the
    /// capture was cancelled, the file contains no machine any more, and the guest continues.
    fn complete(&mut self, stop: &Stop) -> Verdict {
        match stop.check().and_then(|()| self.write()) {
            Ok(end) => {
                self.bytes += end.saturating_sub(self.offset + self.blocks.total());
                Verdict::Taken
            }
            Err(error) => {
                self.discard();
                Verdict::Refused(error)
            }
        }
    }

    /// The number of bytes besides the channels' pages: head, bitmaps and devices, at the end including the gaps.
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }

    fn send_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
}
