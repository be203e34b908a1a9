//! QEMU's main stream as the engine's passes see it.
//!
//! A [`MainStream`] turns the calls of a [`Migration`](multifd::live::Migration) into those of an [`Outgoing`]. The
//! devices are what the guest's stop gives, or a captured machine's, which travel as they came.

use std::time::{Duration, Instant};

use multifd::{
    Error, Result,
    live::{self, Main, Pass},
    ram::{PageIndex, RamBlocks},
};

use super::Outgoing;
use crate::{
    connection::Connection,
    embedder::{devices_of, list_of},
    error::CallerMistake,
    format::{BlockIndex, BlockList, DevicePart},
};

/// The main stream of a live migration.
pub struct MainStream<C> {
    outgoing: Outgoing<C>,
    captured: Option<(BlockList, DevicePart)>,
    end_timeout: Option<Duration>,
}

impl<C: Connection> MainStream<C> {
    /// The stream of a running machine, whose block list is the engine's and whose devices come from its guest.
    pub fn of_guest(outgoing: Outgoing<C>) -> Self {
        Self { outgoing, captured: None, end_timeout: Some(END) }
    }

    /// The stream of a captured machine, whose block list and devices are replayed.
    pub fn of_capture(outgoing: Outgoing<C>, blocks: BlockList, devices: DevicePart) -> Self {
        Self { outgoing, captured: Some((blocks, devices)), end_timeout: Some(END) }
    }

    /// How long the destination may take, when it has got everything, to say that it has. Default 600 s; `None` is for
    /// ever, as QEMU waits. It may be writing a file to a slow disk. One that is given up is taken for failed, and the guest
    /// goes on at the source: whoever sets this short makes sure by other means that it does not run there as well.
    #[must_use]
    pub fn end_timeout(mut self, limit: Option<Duration>) -> Self {
        self.end_timeout = limit;
        self
    }

    /// The stream behind it.
    pub fn into_inner(self) -> Outgoing<C> {
        self.outgoing
    }

    fn list(&self, blocks: &RamBlocks) -> Result<BlockList, CallerMistake> {
        match &self.captured {
            Some((list, _)) => Ok(list.clone()),
            None => list_of(blocks),
        }
    }
}

impl<C: Connection> Main for MainStream<C> {
    fn begin(&mut self, channels: u8) -> Result<()> {
        self.outgoing.begin(channels).map_err(failed)
    }

    fn setup(&mut self, blocks: &RamBlocks) -> Result<()> {
        let list = self.list(blocks).map_err(failed)?;
        self.outgoing.setup(list).map_err(failed)?;
        match &self.captured {
            Some((_, devices)) => self.outgoing.early(devices).map_err(failed),
            None => Ok(()),
        }
    }

    fn begin_pass(&mut self, pass: Pass) -> Result<()> {
        match pass {
            Pass::Live => self.outgoing.begin_part(),
            Pass::Final => self.outgoing.begin_end(),
        }
        .map_err(failed)
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.outgoing.zero_page(block, page).map_err(failed)
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        self.outgoing.page(block, page, bytes).map_err(failed)
    }

    fn end_pass(&mut self, _pass: Pass) -> Result<()> {
        self.outgoing.end_part().map_err(failed)
    }

    fn switchover(&mut self) -> Result<()> {
        self.outgoing.switchover().map_err(failed)
    }

    fn devices(&mut self, devices: Vec<live::DeviceSection>) -> Result<()> {
        let part = match &self.captured {
            Some((_, captured)) => captured.clone(),
            None => {
                let options = self.outgoing.options();
                devices_of(devices, options.page_size().bytes(), options.section).map_err(failed)?
            }
        };
        self.outgoing.devices(&part).map_err(failed)
    }

    fn complete(&mut self) -> Result<()> {
        let deadline = self.end_timeout.map(|limit| Instant::now() + limit);
        self.outgoing.complete(deadline).map_err(failed)
    }

    fn bytes(&self) -> u64 {
        self.outgoing.bytes()
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::other("the main stream failed", error)
}

const END: Duration = Duration::from_secs(600);
