//! The contents of a complete stream other than RAM.

use multifd::live::RunState;

use crate::format::{BlockList, Configuration, DevicePart, DeviceSection, SectionId, SyncMode};

/// The contents of a complete stream other than RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// The configuration; `None` from machine types up to 2.3.
    pub configuration: Option<Configuration>,
    /// The RAM blocks.
    pub blocks: BlockList,
    /// The number of the RAM section. No device has the same number.
    pub section: SectionId,
    /// How the ends of dirty rounds were marked. Legacy as well when multifd is off at the source.
    pub sync_mode: SyncMode,
    /// Whether the source waits for our SHUT.
    pub return_path: bool,
    /// Whether SWITCHOVER_START was sent.
    pub switchover_start: bool,
    /// Whether the source has switched to post-copy.
    pub postcopy: bool,
    /// Whether sections have footers.
    pub footers: bool,
    /// The devices and their description, if the source has sent one.
    pub devices: DevicePart,
    /// Bytes of the main stream.
    pub bytes: u64,
}

impl Loaded {
    /// Whether the guest ran at the source; `None` if the source does not report it. A guest that was paused stays paused.
    pub fn run_state(&self) -> Option<RunState> {
        self.devices.run_state()
    }

    /// The device of this name and instance: its section and its state.
    pub fn device(&self, name: &str, instance: u32) -> Option<(&DeviceSection, &[u8])> {
        self.devices.find(name, instance)
    }
}
