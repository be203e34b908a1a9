//! The destination of a stream: the calls that the driver makes as it reads.
//!
//! A method is required if data would be lost without an error where an implementor forgets it: those that write and read pages,
//! and the sync point of the channels. All others have a default, and later ones will have one, so a new event breaks no
//! implementor. A program that wants every event uses [`Events`](super::Events).

use multifd::{
    ram::{BlockIndex, PageBitmap, PageIndex},
    wire::ChannelId,
};

use crate::{
    error::{Error, Place},
    format::{BlockList, Configuration},
};

/// Receives the contents of a stream. Calls are made in the order of the stream; the first error ends the migration.
pub trait Destination {
    /// The error type.
    type Error: Into<Box<dyn std::error::Error + Send + Sync>>;

    /// The configuration, with page size and UUID; `None` from machine types up to 2.3. A destination that needs shared RAM
    /// refuses `ignore_shared` here. By default every machine is accepted.
    ///
    /// # Errors
    /// If the configuration is not acceptable.
    fn configuration(&mut self, configuration: Option<&Configuration>) -> Result<(), Self::Error> {
        let _ = configuration;
        Ok(())
    }

    /// The number of channels of the source, 0 if multifd is off. Called before the blocks, and only for a source that
    /// announces it: one of this library, with a return path. By default nothing is done.
    ///
    /// # Errors
    /// If it expects another number.
    fn channels(&mut self, channels: u8) -> Result<(), Self::Error> {
        let _ = channels;
        Ok(())
    }

    /// The source has multifd on: its sync points are marked in round mode. Called before the first sync point, and not for
    /// every source that has multifd on. A destination without channels refuses it. By default nothing is done.
    ///
    /// # Errors
    /// If it has no channels.
    fn multifd(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The RAM blocks. Called once, before all pages. From here on channels may fill pages.
    ///
    /// # Errors
    /// If it does not have these blocks and cannot create them.
    fn blocks(&mut self, blocks: &BlockList) -> Result<(), Self::Error>;

    /// A section of RAM begins: a PART, or with `last` the END. A pass of a QEMU has many sections, unless it has few pages. By
    /// default nothing is done.
    ///
    /// # Errors
    /// If the migration should end.
    fn section(&mut self, last: bool) -> Result<(), Self::Error> {
        let _ = last;
        Ok(())
    }

    /// A channel sync: returns when every channel has reached its next SYNC, and lets them continue.
    /// Without channels nothing has to be done: then multifd is off at the source.
    ///
    /// # Errors
    /// If a channel has failed.
    fn sync(&mut self) -> Result<(), Self::Error>;

    /// The page is zero now.
    ///
    /// # Errors
    /// If the page cannot be cleared.
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<(), Self::Error>;

    /// The page has these contents now: multifd is off at the source.
    ///
    /// # Errors
    /// If the page cannot be written.
    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Reads the current contents of the page, to which the source has encoded changes.
    ///
    /// # Errors
    /// If the page cannot be read.
    fn read_page(&mut self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<(), Self::Error>;

    /// The source has capability `postcopy-ram` on: POSTCOPY_ADVISE. It may switch to post-copy, and with `postcopy-preempt` it
    /// opens one more connection. Called before the blocks. By default nothing is done.
    ///
    /// # Errors
    /// If post-copy is not acceptable.
    fn postcopy_advised(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Pages of a block are out of date: the source sends all of them again. Only called if post-copy is
    /// [served](super::Incoming::postcopy). By default nothing is done, which is right for a destination that does not check
    /// whether RAM is complete.
    ///
    /// # Errors
    /// If the pages cannot be forgotten.
    fn discard(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<(), Self::Error> {
        let _ = (block, first, count);
        Ok(())
    }

    /// The source has stopped its guest for good and sends its last pages: POSTCOPY_RUN. Only called if post-copy is
    /// [served](super::Incoming::postcopy). By default nothing is done.
    ///
    /// # Errors
    /// If the migration should end.
    fn postcopy_run(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The pages of a block that have arrived. Asked when the source has returned after a broken connection: it sends all
    /// others. By default `None`: it sends all pages again.
    fn arrived(&self, block: BlockIndex) -> Option<&PageBitmap> {
        let _ = block;
        None
    }

    /// The source has returned over a [new connection](super::Incoming::run_resumable), before anything is read from it. With
    /// `postcopy-preempt` it opens that connection again as well. By default nothing is done.
    ///
    /// # Errors
    /// If the migration should end.
    fn postcopy_resumed(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The source asks, after a sync point, which channels are lost: all that are, in order. It sends what they have carried since the
    /// question before again. From now on a channel whose connection breaks is lost, and no failure. Only called if [that is
    /// on](super::Incoming::channels_may_break). By default none is lost, which is right if each channel that breaks is a failure.
    ///
    /// # Errors
    /// If the migration should end.
    fn round(&mut self) -> Result<Vec<ChannelId>, Self::Error> {
        Ok(Vec::new())
    }

    /// The source has lost a channel: the next sync point must not wait for its SYNC, but until nothing more is written from it. Called
    /// under the same condition. By default nothing is done, which is right if each channel that breaks is a failure.
    ///
    /// # Errors
    /// If there is no such channel, or the migration cannot continue without it.
    fn lose(&mut self, channel: ChannelId) -> Result<(), Self::Error> {
        let _ = channel;
        Ok(())
    }

    /// Whether more of a pass must follow before the source may be silent for long: asked after the source has been silent for
    /// the [stall timeout](super::Incoming::stall_timeout) between two sections of RAM. A source that waits before its
    /// switchover has finished its packets, and has little left to send. By default nothing is known.
    fn is_within_pass(&self) -> bool {
        false
    }

    /// All of RAM has arrived; from now on no page may change. By default nothing is done, which is right without channels.
    ///
    /// # Errors
    /// If a channel is still receiving.
    fn end_of_ram(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// The error of a destination that refuses `what`. `at` is the place in the stream.
pub(super) fn refused(
    at: Place,
    what: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::Destination { at, what, source: source.into() }
}
