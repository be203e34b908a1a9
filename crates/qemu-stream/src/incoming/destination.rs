//! What takes a machine in: the calls that a stream makes as it is read.
//!
//! Required are the calls without which data would be lost and nobody told: where pages go, what they were, when channels may
//! go on. All others have a default that is right for a destination with nothing to say there, and so will later ones: a new
//! event of the stream breaks no implementor. Who wants each event uses [`Events`](super::Events).

use multifd::ram::{BlockIndex, PageIndex};

use crate::{
    error::{Error, Place},
    format::{BlockList, Configuration},
};

/// What takes a machine in. Calls come in the order of the stream; the first error ends the migration.
pub trait Destination {
    /// What it fails with.
    type Error: Into<Box<dyn std::error::Error + Send + Sync>>;

    /// What both sides must agree on; `None` from machine types up to 2.3. Page size and UUID are in it.
    /// A destination that cannot do without shared RAM refuses `ignore_shared` here. By default any machine is taken.
    ///
    /// # Errors
    /// If it does not agree.
    fn configuration(&mut self, configuration: Option<&Configuration>) -> Result<(), Self::Error> {
        let _ = configuration;
        Ok(())
    }

    /// The source has this many channels, 0 if multifd is off. Comes before the blocks, and only from a source that
    /// announces it: this library's, with a return path. A destination without channels has nothing to do.
    ///
    /// # Errors
    /// If it expects another number.
    fn channels(&mut self, channels: u8) -> Result<(), Self::Error> {
        let _ = channels;
        Ok(())
    }

    /// The source has multifd on: it marks its rounds as only such a source does. Comes before the first sync point, and not
    /// from every source. A destination without channels refuses it; by default nothing is done.
    ///
    /// # Errors
    /// If it has no channels.
    fn multifd(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The RAM blocks. Comes once, before all pages; channels may fill pages from here on.
    ///
    /// # Errors
    /// If it has not these blocks and cannot make them.
    fn blocks(&mut self, blocks: &BlockList) -> Result<(), Self::Error>;

    /// A channel sync: returns when every channel has come to its next SYNC, and lets them go on.
    /// Nothing to do when no channel has connected: then multifd is off at the source.
    ///
    /// # Errors
    /// If a channel has failed.
    fn sync(&mut self) -> Result<(), Self::Error>;

    /// The page is zero now, whatever it was.
    ///
    /// # Errors
    /// If the page cannot be cleared.
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<(), Self::Error>;

    /// The page has these contents now: multifd is off at the source.
    ///
    /// # Errors
    /// If the page cannot be written.
    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Gives the page's contents, against which the source has encoded its new ones.
    ///
    /// # Errors
    /// If the page cannot be read.
    fn read_page(&mut self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<(), Self::Error>;

    /// All of RAM is here; from now on no page may change. By default nothing is done, which is right without channels.
    ///
    /// # Errors
    /// If a channel is still in the middle of something.
    fn end_of_ram(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// The error of a destination that refuses what comes, `at` where the stream has got.
pub(super) fn refused(
    at: Place,
    what: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    Error::Destination { at, what, source: source.into() }
}
