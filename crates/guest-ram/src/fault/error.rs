//! Why memory cannot be armed or served.

use std::{fmt, io};

use crate::{BlockName, BlockOffset};

use super::Features;

/// Why page faults cannot be delivered to this process, or a page cannot be placed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The kernel has no `userfaultfd` at all.
    #[error("the kernel has no userfaultfd: it is older than Linux 4.3, or built without CONFIG_USERFAULTFD")]
    NoUserfaultfd,
    /// This process may not receive the faults of system calls and vCPUs.
    #[error(
        "this process may not handle page faults of the kernel, which every vCPU causes: the system call was refused \
         (vm.unprivileged_userfaultfd is {}{}), and /dev/userfaultfd {device}. Give the process access to \
         /dev/userfaultfd (Linux 6.1), or CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1",
        sysctl.as_deref().unwrap_or("unknown"),
        if sysctl.as_deref() == Some("1") { ", so a seccomp filter has probably refused it" } else { "" }
    )]
    NotPermitted {
        /// The value of `vm.unprivileged_userfaultfd`, if it can be read.
        sysctl: Option<String>,
        /// Why the device cannot be used.
        device: DeviceState,
    },
    /// The system call was refused although it needs no privilege.
    #[error(
        "the system call userfaultfd was refused, although it needs no privilege: a seccomp filter forbids it"
    )]
    Forbidden,
    /// The kernel lacks a feature.
    #[error("the kernel lacks the userfaultfd features {lacking}: Linux {since} or later has them")]
    Lacks {
        /// The features.
        lacking: Features,
        /// The first version that has all of them.
        since: &'static str,
    },
    /// A block's memory cannot be armed.
    #[error("block {name:?}: its memory cannot be armed: {why}")]
    Unsuitable {
        /// The block.
        name: BlockName,
        /// The reason.
        why: String,
    },
    /// Another `userfaultfd` has the memory.
    #[error(
        "block {name:?}: another userfaultfd watches its memory: a dirty log of its page table, another capture of one moment, or a pager must end first"
    )]
    Watched {
        /// The block.
        name: BlockName,
    },
    /// Memory that is to be filled has contents already.
    #[error(
        "block {name:?}: the page at offset {offset} exists already, and a page that exists causes no fault: use new memory, \
         or discard what it contains (MADV_DONTNEED; MADV_REMOVE if it is shared)"
    )]
    NotEmpty {
        /// The block.
        name: BlockName,
        /// The offset of the first such page.
        offset: BlockOffset,
    },
    /// The bytes are not whole host pages of armed memory.
    #[error("block {block}: {len:#x} bytes at offset {offset} are not whole host pages of armed memory")]
    Outside {
        /// The block's number.
        block: usize,
        /// The offset of the first byte.
        offset: BlockOffset,
        /// The number of bytes.
        len: u64,
    },
    /// The memory was armed before.
    #[error("the memory was armed before, and can be armed once")]
    ArmedBefore,
    /// The process whose memory is armed has ended.
    #[error("the process whose memory is armed has ended")]
    ProcessEnded,
    /// A descriptor that another process has handed over cannot be used.
    #[error("expected an armed userfaultfd from the other process: {why}")]
    NotHandedOver {
        /// The reason.
        why: String,
    },
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// Why `/dev/userfaultfd` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// There is no such device.
    Missing,
    /// This process may not open it.
    Refused,
    /// Something else.
    Failed(String),
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("does not exist"),
            Self::Refused => f.write_str("exists, but this process may not open it"),
            Self::Failed(why) => write!(f, "cannot be used: {why}"),
        }
    }
}

impl FaultError {
    pub(super) fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |error| match error {
            rustix::io::Errno::SRCH => Self::ProcessEnded,
            error => Self::System { what, source: error.into() },
        }
    }
}
