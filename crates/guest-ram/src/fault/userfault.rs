//! An open `userfaultfd` whose features are known, without memory.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::io::Errno;

use super::{DeviceState, FaultError, Features, features::OPTIONAL, kernel};

/// Whose faults are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultsFrom {
    /// Those of threads in user mode, of system calls and of vCPUs. A virtual machine needs this. It needs a privilege.
    Everything,
    /// Only those of threads in user mode. A system call that accesses a missing page fails with `EFAULT`. It needs no
    /// privilege (Linux 5.11).
    UserMode,
}

/// An open `userfaultfd`. [`Armed`](super::Armed) registers memory with it.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    features: Features,
}

impl Userfault {
    /// Opens a `userfaultfd` with these features. Features that only some kinds of memory need are added where the kernel
    /// has them. For [everything](FaultsFrom::Everything), the system call is tried first, then `/dev/userfaultfd`.
    ///
    /// # Errors
    /// [`FaultError::NotPermitted`] with the remedy, [`FaultError::Lacks`] with the kernel that is needed, and others.
    pub fn open(needs: Features, from: FaultsFrom) -> Result<Self, FaultError> {
        // The features of a kernel are known only after the first call, which can be made once for each descriptor.
        let probe = open(from)?;
        let has = kernel::handshake(probe.as_fd(), 0)
            .map_err(FaultError::system("ask for the features of userfaultfd"))?;
        drop(probe);
        let has = Features::of_bits(has);
        let lacking = has.lacking(needs);
        if lacking != Features::NONE {
            return Err(FaultError::Lacks { lacking, since: lacking.since() });
        }
        let fd = open(from)?;
        let features = needs | has.common(OPTIONAL);
        kernel::handshake(fd.as_fd(), features.bits())
            .map_err(FaultError::system("agree on features of userfaultfd"))?;
        Ok(Self { fd, features })
    }

    /// The features that were agreed on.
    pub fn features(&self) -> Features {
        self.features
    }

    /// A descriptor of which another process says that these features were agreed on.
    pub(super) fn handed_over(fd: OwnedFd, features: Features) -> Self {
        Self { fd, features }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open(from: FaultsFrom) -> Result<OwnedFd, FaultError> {
    match kernel::by_call(from == FaultsFrom::UserMode) {
        Ok(fd) => Ok(fd),
        Err(Errno::NOSYS) => Err(FaultError::NoUserfaultfd),
        // The flag is unknown to the kernel.
        Err(Errno::INVAL) if from == FaultsFrom::UserMode => open(FaultsFrom::Everything),
        Err(Errno::PERM) if from == FaultsFrom::UserMode => Err(FaultError::Forbidden),
        Err(Errno::PERM) => kernel::by_device().map_err(|error| FaultError::NotPermitted {
            sysctl: fs::read_to_string(SYSCTL).ok().map(|text| text.trim().to_owned()),
            device: match error {
                Errno::NOENT | Errno::NXIO | Errno::NODEV => DeviceState::Missing,
                Errno::ACCESS | Errno::PERM => DeviceState::Refused,
                error => DeviceState::Failed(error.to_string()),
            },
        }),
        Err(error) => Err(FaultError::system("open a userfaultfd")(error)),
    }
}

const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";
