//! Calls that cannot be, as the embedder or the program made them.

use crate::{
    outcome::Status,
    ram::{self, BlockName, PageSize},
};

/// A call that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Usage {
    /// Blocks, memory or a file that cannot be used so.
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
    /// A way of zero pages that there is not.
    #[error("expected zero-page-detection none, legacy or multifd, found {found:?}")]
    ZeroPageDetection {
        /// The name given.
        found: String,
    },
    /// Origins of channels in no form that is known.
    #[error("expected channels-from main, any, or IP addresses with commas between them, found {found:?}")]
    ChannelsFrom {
        /// The text given.
        found: String,
    },
    /// A method that this build does not speak.
    #[error("expected multifd-compression {known}, found {found:?}")]
    Method {
        /// The name given.
        found: String,
        /// Those that there are: `none, zlib or zstd`.
        known: String,
    },
    /// An address in no form that is known, or with a part that cannot be.
    #[error("address {found:?}: {why}")]
    Address {
        /// The text given, or the address as text.
        found: String,
        /// What is wrong, and what is expected.
        why: String,
    },
    /// An option behind an address that is not known, or not so.
    #[error("address option: expected {expected}, found {found:?}")]
    AddressOption {
        /// What it can be.
        expected: &'static str,
        /// The option given.
        found: String,
    },
    /// The transport has one connection only, and more were asked for.
    #[error(
        "{0} is a single connection and cannot carry channels: set multifd-channels to 0, or use tcp, unix or vsock"
    )]
    SingleConnection(String),
    /// The sender is to end with pages that no sync point has followed.
    #[error("pages were queued after the last sync and may not have left: call sync before finish")]
    Unsynced,
    /// `zero-copy-send` where pages are copied anyway.
    #[error("zero-copy-send cannot be used {0}: pages would be copied all the same, so switch it off")]
    ZeroCopy(&'static str),
    /// An option for channels, in a migration without channels.
    #[error("{0} has no effect with multifd-channels 0: switch it off, or use channels")]
    WithoutChannels(&'static str),
    /// An option for connections, where there are none.
    #[error(
        "{0} is for connections: between memory and a file pages are copied as they are, so switch it off"
    )]
    ForConnections(&'static str),
    /// Blocks that cannot be copied into blocks of their names.
    #[error("block {name:?} cannot be copied: {why}")]
    OtherBlocks {
        /// The block's name.
        name: BlockName,
        /// What is in the way.
        why: String,
    },
    /// TLS to an address that names no host, and no name given.
    #[error("{0} has no host name to hold the certificate of tls-creds against: give tls-hostname")]
    NoTlsHostname(String),
    /// The source has announced a block, and this side has made none of that name.
    #[error("block {0:?} is announced by the source and missing here")]
    BlockMissing(BlockName),
    /// This side has made a block that the source has not announced.
    #[error("block {0:?} is not announced by the source: nothing would ever be written to it")]
    BlockSurplus(BlockName),
    /// A block of another length than the source has announced.
    #[error("block {name:?}: the source announces {announced:#x} bytes, this side has {found:#x}")]
    BlockLength {
        /// The block's name.
        name: BlockName,
        /// The length that the source has announced, in bytes.
        announced: u64,
        /// The length here, in bytes.
        found: u64,
    },
    /// A block that is left out because its memory is shared, where the other side does not leave it out.
    #[error(
        "block {0:?} is ignored as shared memory, but the configuration lacks x-ignore-shared: its pages would be lost"
    )]
    NotShared(BlockName),
    /// Bytes that are no whole pages of the block.
    #[error("block {name:?}: {length:#x} bytes are no whole pages")]
    NotWholePages {
        /// The block's name.
        name: BlockName,
        /// The bytes given.
        length: usize,
    },
    /// An inherited descriptor that cannot carry a migration.
    #[error(
        "fd:{fd} is {found}, expected {expected}: have the parent process pass one, or use tcp, unix or vsock"
    )]
    Descriptor {
        /// The descriptor's number.
        fd: i32,
        /// What it is.
        found: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A command is to be started in a process that ignores `SIGCHLD`, so that its exit status would not be known.
    #[error(
        "exec: cannot be used while this process ignores SIGCHLD (SIG_IGN, or SA_NOCLDWAIT): whether the command succeeded \
         could not be known, and its success would count as a failure; set SIGCHLD to its default action before"
    )]
    ChildrenIgnored,
    /// Pages are to be packed, or to go over main, in memory that somebody may take away.
    #[error(
        "block {0:?} is a mapping of a file that may be cut shorter, and to pack its pages, or to send them over main, would \
         end this process by SIGBUS then: seal the memfd against it (F_SEAL_SHRINK), or send over channels with \
         multifd-compression none"
    )]
    MayShrink(BlockName),
    /// The block ends inside a page, and the wire carries whole pages only.
    #[error(
        "block {name:?}: {used_length:#x} bytes end inside a page of {page_size}, whose bytes cannot be sent"
    )]
    PartialPage {
        /// The block's name.
        name: BlockName,
        /// The block's used length.
        used_length: u64,
        /// The page size of the migration.
        page_size: PageSize,
    },
    /// Two devices of one name and instance.
    #[error("device {name:?} instance {instance} is there twice")]
    DeviceTwice {
        /// The device's name.
        name: String,
        /// Its instance.
        instance: u32,
    },
    /// The state of a device that is not what the guest has announced.
    #[error("device {name:?} instance {instance}: {why}")]
    DeviceState {
        /// The device's name.
        name: String,
        /// Its instance.
        instance: u32,
        /// What is wrong with it.
        why: String,
    },
    /// `auto-converge` for a guest that cannot be held back.
    #[error("auto-converge needs a guest that can be throttled (Guest::throttle): switch auto-converge off")]
    NoThrottle,
    /// Guest memory was written after the guest had been stopped.
    #[error(
        "block {name:?}: {pages} pages were written after the guest was stopped: Guest::stop must wait for processors, \
         devices and requests under way"
    )]
    WrittenAfterStop {
        /// The block's name.
        name: BlockName,
        /// How many of its pages.
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
    /// The block's memory cannot be received into.
    #[error("block {0:?} is mapped for reading and cannot be received into")]
    ReadOnly(BlockName),
    /// A sender or receiver was set up for the second time.
    #[error("this end of the migration was set up before: make a new one for each migration")]
    UsedTwice,
    /// A call that needs what has not been set up yet.
    #[error("{0} is not there yet: set it up first")]
    TooEarly(&'static str),
    /// A migration was told to go on while it was not waiting to be.
    #[error("the migration is {found}: it can be told to go on when it is pre-switchover")]
    NotPaused {
        /// Its state.
        found: Status,
    },
    /// A state that does not follow the present one.
    #[error("a migration that is {from} cannot become {to}")]
    IllegalTransition {
        /// The present state.
        from: Status,
        /// The state asked for.
        to: Status,
    },
}
