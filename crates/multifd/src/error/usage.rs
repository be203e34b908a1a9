//! Invalid calls and options of the embedder or the program.

use super::UntrustedText;
use crate::{
    outcome::Status,
    ram::{self, BlockName, PageSize},
};

/// An invalid call or option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Usage {
    /// Blocks, memory or a file that cannot be used in this way.
    #[error(transparent)]
    Ram(#[from] ram::Error),
    /// A number outside of its [range](crate::parameters).
    #[error("expected {name} {least} to {most}, found {found}")]
    OutOfRange {
        /// The parameter.
        name: &'static str,
        /// The least value.
        least: u64,
        /// The greatest value.
        most: u64,
        /// The value given.
        found: i128,
    },
    /// An unknown method for the detection of zero pages.
    #[error("expected zero-page-detection none, legacy or multifd, found {found:?}")]
    ZeroPageDetection {
        /// The name given.
        found: String,
    },
    /// An invalid value of `channels-from`.
    #[error("expected channels-from main, any, or IP addresses with commas between them, found {found:?}")]
    ChannelsFrom {
        /// The text given.
        found: String,
    },
    /// A compression method that this build does not support.
    #[error("expected multifd-compression {known}, found {found:?}")]
    Method {
        /// The name given.
        found: String,
        /// The methods that this build supports: `none, zlib or zstd`.
        known: String,
    },
    /// An invalid address.
    #[error("address {found:?}: {why}")]
    Address {
        /// The text given, or the address as text.
        found: String,
        /// What is wrong, and what is expected.
        why: String,
    },
    /// An option of an address that is unknown, or has an invalid value.
    #[error("address option: expected {expected}, found {found:?}")]
    AddressOption {
        /// What is allowed.
        expected: &'static str,
        /// The option given.
        found: String,
    },
    /// The transport has a single connection, and channels were requested.
    #[error(
        "{0} is a single connection and cannot carry channels: set multifd-channels to 0, or use tcp, unix or vsock"
    )]
    SingleConnection(String),
    /// Memory that cannot be handed over to another process.
    #[error("the memory cannot be handed over: {why}")]
    HandOver {
        /// The reason.
        why: String,
    },
    /// The sender was finished, and there are pages that no sync point has followed.
    #[error("pages were queued after the last sync and may not have been sent: call sync before finish")]
    Unsynced,
    /// `zero-copy-send` is on where pages are always copied.
    #[error("zero-copy-send cannot be used {0}, because pages are always copied there: switch it off")]
    ZeroCopy(&'static str),
    /// An option for channels, in a migration without channels.
    #[error("{0} has no effect with multifd-channels 0: switch it off, or use channels")]
    WithoutChannels(&'static str),
    /// An option for connections is on where there are no connections.
    #[error("{0} can only be used with connections, not between memory and a file: switch it off")]
    ForConnections(&'static str),
    /// A block that cannot be copied into the block of the same name.
    #[error("block {name:?} cannot be copied: {why}")]
    OtherBlocks {
        /// The block's name.
        name: BlockName,
        /// The reason.
        why: String,
    },
    /// TLS to an address without a host name, and `tls-hostname` is not set.
    #[error("{0} has no host name to compare with the certificate (tls-creds): set tls-hostname")]
    NoTlsHostname(String),
    /// The source has announced a block that does not exist on this side.
    #[error(
        "block {0:?} is announced by the source and does not exist on this side: use the same machine on both sides"
    )]
    BlockMissing(BlockName),
    /// This side has a block that the source has not announced.
    #[error(
        "block {0:?} exists on this side and is not announced by the source: use the same machine on both sides"
    )]
    BlockSurplus(BlockName),
    /// The length of a block differs from the one that the source has announced.
    #[error("block {name:?}: the source announces {announced:#x} bytes, this side has {found:#x}")]
    BlockLength {
        /// The block's name.
        name: BlockName,
        /// The length that the source has announced, in bytes.
        announced: u64,
        /// The length here, in bytes.
        found: u64,
    },
    /// A block is ignored because its memory is shared, but the other side expects its pages.
    #[error(
        "block {0:?} is ignored as shared memory, but the configuration lacks x-ignore-shared: its pages would be lost"
    )]
    NotShared(BlockName),
    /// The bytes are not whole pages of the block.
    #[error("block {name:?}: {length:#x} bytes are not whole pages")]
    NotWholePages {
        /// The block's name.
        name: BlockName,
        /// The number of bytes.
        length: usize,
    },
    /// An inherited descriptor that cannot be used for a migration.
    #[error(
        "fd:{fd} is {found}, expected {expected}: let the parent process pass one, or use tcp, unix or vsock"
    )]
    Descriptor {
        /// The descriptor's number.
        fd: i32,
        /// What it is.
        found: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A command cannot be started in a process that ignores `SIGCHLD`, because its exit status would be lost.
    #[error(
        "exec: cannot be used while this process ignores SIGCHLD (SIG_IGN, or SA_NOCLDWAIT), because the exit status of the \
         command would be lost and its success would count as a failure: set SIGCHLD to its default action before"
    )]
    ChildrenIgnored,
    /// Pages of this block are to be compressed or sent over main, and the file that holds them may become shorter
    /// meanwhile.
    #[error(
        "block {0:?} is a mapping of a file that may be made shorter; then SIGBUS would end this process while it compresses \
         the block's pages or sends them over main: seal the memfd (F_SEAL_SHRINK), or send over channels with \
         multifd-compression none"
    )]
    MayShrink(BlockName),
    /// The block does not end at a page boundary, and only whole pages can be sent.
    #[error(
        "block {name:?}: {used_length:#x} bytes end inside a page of {page_size}, and only whole pages can be sent"
    )]
    PartialPage {
        /// The block's name.
        name: BlockName,
        /// The block's used length.
        used_length: u64,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// Text that cannot be the name of a device.
    #[error("name of a device: expected 1 to 255 bytes without NUL, found {found:?} ({} bytes)", found.as_raw().len())]
    DeviceName {
        /// The text.
        found: UntrustedText,
    },
    /// Two devices have the same name and instance.
    #[error("device {name:?} instance {instance} exists twice")]
    DeviceTwice {
        /// The device's name.
        name: String,
        /// Its instance.
        instance: u32,
    },
    /// The state of a device does not match what the guest has announced.
    #[error("device {name:?} instance {instance}: {why}; the guest stays at the source")]
    DeviceState {
        /// The device's name.
        name: String,
        /// Its instance.
        instance: u32,
        /// What does not match.
        why: String,
    },
    /// `auto-converge` is on, and the guest cannot be throttled.
    #[error("auto-converge needs a guest that can be throttled (Guest::throttle): switch auto-converge off")]
    NoThrottle,
    /// Guest memory was written after the guest had been stopped.
    #[error(
        "block {name:?}: {pages} pages were written after the guest was stopped: Guest::stop must wait for processors, \
         | devices and running requests"
    )]
    WrittenAfterStop {
        /// The block's name.
        name: BlockName,
        /// The number of pages that were written.
        pages: u64,
    },
    /// A page that the block does not have.
    #[error("block {name:?} has no page {page} ({pages} pages)")]
    NoSuchPage {
        /// The block's name.
        name: BlockName,
        /// The page asked for.
        page: u64,
        /// The pages of the block.
        pages: u64,
    },
    /// The memory of the block cannot be written.
    #[error("block {0:?} is mapped for reading only and cannot receive pages")]
    ReadOnly(BlockName),
    /// A stop was given to a second migration.
    #[error(
        "this stop belongs to another migration, running or ended: create a Stop for each migration, and cancel each by its \
         own"
    )]
    StopTaken,
    /// A sender or receiver was used for a second migration.
    #[error("this sender or receiver was used before: create a new one for each migration")]
    UsedTwice,
    /// A call that needs something that is not set yet.
    #[error("{0} is not available yet: set it first")]
    TooEarly(&'static str),
    /// A text that says when to switch to post-copy.
    #[error("expected never, request, start, stall, passes:N or after:SECONDS, found {found:?}")]
    PostcopyWhen {
        /// The text.
        found: String,
    },
    /// A migration cannot switch to post-copy.
    #[error("the migration cannot switch to post-copy: {why}")]
    NoPostcopy {
        /// The reason.
        why: &'static str,
    },
    /// A migration cannot be continued, because it does not wait for that.
    #[error("the migration is {found}: it can only be continued when it is pre-switchover")]
    NotPaused {
        /// The state of the migration.
        found: Status,
    },
    /// A state that cannot follow the current one.
    #[error("a migration that is {from} cannot become {to}")]
    IllegalTransition {
        /// The current state.
        from: Status,
        /// The requested state.
        to: Status,
    },
}
