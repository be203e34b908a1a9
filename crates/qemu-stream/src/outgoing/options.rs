//! The options of an outgoing migration.

use std::time::Duration;

use multifd::ram::PageSize;

use crate::{
    error::Usage,
    format::{Configuration, MachineType, PageSizes, SectionId, SyncMode},
};

/// How the stream is written. The defaults follow the machine type, as in QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Options {
    pub(super) configuration: Option<Configuration>,
    pub(super) sync_mode: Option<SyncMode>,
    pub(super) return_path: bool,
    pub(super) switchover_start: bool,
    pub(crate) section: SectionId,
    pub(super) footers: bool,
    /// The page sizes to announce, for a source that may switch to post-copy.
    pub(super) advise: Option<PageSizes>,
    pub(super) channels_may_break: bool,
}

impl Options {
    /// The options of a machine with this configuration: multifd on, with the sync mode of the machine type (round if the
    /// type has no version); a return path; SWITCHOVER_START if the type has it. The capability mapped-ram of a file's
    /// configuration is removed, because pages have no fixed places in a connection.
    pub fn new(configuration: Configuration) -> Self {
        let machine = &configuration.machine;
        Self {
            sync_mode: Some(machine.sync_mode().unwrap_or(SyncMode::Round)),
            return_path: true,
            switchover_start: machine.has_switchover_start(),
            section: SectionId(1),
            footers: machine.has_footers(),
            advise: None,
            channels_may_break: false,
            configuration: Some(Configuration { mapped_ram: false, ..configuration }),
        }
    }

    /// The options of a machine type up to 2.3, which has neither configuration nor footers.
    pub fn without_configuration() -> Self {
        Self {
            configuration: None,
            sync_mode: Some(SyncMode::Legacy),
            return_path: true,
            switchover_start: false,
            section: SectionId(1),
            footers: false,
            advise: None,
            channels_may_break: false,
        }
    }

    /// Sets the sync mode; `None` if multifd is off. It must be that of the destination. A destination refuses a wrong one,
    /// or waits without limit.
    pub fn sync_mode(mut self, mode: Option<SyncMode>) -> Self {
        self.sync_mode = mode;
        self
    }

    /// Whether the migration continues without a channel that breaks, if the destination agrees: see
    /// [`SourceOptions::channels_may_break`](crate::source::SourceOptions::channels_may_break). Off by default.
    pub fn channels_may_break(mut self, on: bool) -> Self {
        self.channels_may_break = on;
        self
    }

    /// The source may switch to post-copy, and announces these page sizes.
    pub(crate) fn advise(mut self, sizes: PageSizes) -> Self {
        self.advise = Some(sizes);
        self
    }

    /// With channels, the sync mode that was set, or that of the machine type; without channels, none.
    pub(crate) fn multifd(mut self, on: bool) -> Self {
        let machine = self.configuration.as_ref().map(|configuration| &configuration.machine);
        let round =
            || machine.map_or(SyncMode::Legacy, |machine| machine.sync_mode().unwrap_or(SyncMode::Round));
        self.sync_mode = on.then(|| self.sync_mode.unwrap_or_else(round));
        self
    }

    /// The sync mode these options have.
    pub fn chosen_sync_mode(&self) -> Option<SyncMode> {
        self.sync_mode
    }

    /// Switches the return path off: the destination is not asked whether it has the guest, and the migration succeeds when
    /// the connection has accepted the last byte.
    ///
    /// **Warning:** if a destination fails at the end, this is not detected, and the guest is lost. Use it only for a
    /// command (`exec:`), whose exit status shows the result, and for destinations that cannot reply.
    pub fn unconfirmed(mut self) -> Self {
        self.return_path = false;
        self
    }

    /// Whether to send SWITCHOVER_START. Destinations before 10.0 refuse it.
    pub fn switchover_start(mut self, on: bool) -> Self {
        self.switchover_start = on;
        self
    }

    /// The number of the RAM section; default 1. It must differ from the devices' numbers, so a replayed machine keeps the
    /// number that it was captured with.
    pub fn section(mut self, id: SectionId) -> Self {
        self.section = id;
        self
    }

    /// Whether sections have footers. The destination must expect the same: it refuses a missing footer and an unexpected
    /// one. By default as in the machine type.
    pub fn footers(mut self, on: bool) -> Self {
        self.footers = on;
        self
    }

    /// The machine type, if there is a configuration.
    pub fn machine(&self) -> Option<&MachineType> {
        self.configuration.as_ref().map(|configuration| &configuration.machine)
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.configuration.as_ref().map(Configuration::page_size).unwrap_or_default()
    }

    pub(crate) fn has_return_path(&self) -> bool {
        self.return_path
    }

    pub(crate) fn ignore_shared(&self) -> bool {
        self.configuration.as_ref().is_some_and(|configuration| configuration.ignore_shared)
    }

    pub(super) fn has_footers(&self) -> bool {
        self.footers
    }

    pub(crate) fn check(&self) -> Result<(), Usage> {
        match self.machine().filter(|machine| !machine.has_footers()) {
            None => Ok(()),
            Some(machine) => {
                Err(Usage::Machine { machine: machine.clone(), why: "has no configuration; leave it out" })
            }
        }
    }
}

/// How long a destination may take to report that it has everything.
pub(crate) const END: Duration = Duration::from_secs(600);
/// The same for a source that was cancelled.
pub(crate) const VERDICT: Duration = Duration::from_secs(10);
