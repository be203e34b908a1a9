//! Decides who has the guest after everything has been sent, from the last message that the source received.
//!
//! ```text
//! source: everything ─▶ destination: restores ─ looks at main ─▶ SHUT 0, and runs the guest
//!         cancelled ── closes its sending side ─▶            └─▶ SHUT 1, if the source has closed or anything failed
//! ```
//!
//! A destination that checks main after the source has closed it sends SHUT 1. If it sent SHUT 0 before, the source may
//! receive it or not; without it the source cannot know the owner.

/// The last message that a source receives from its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWord {
    /// SHUT, with this code: 0 is success.
    Shut(u32),
    /// A violation of the protocol instead of SHUT, or a TLS alert: the destination itself has sent it.
    Nonsense,
    /// The connection was closed or reset without SHUT.
    Closed,
    /// Nothing arrived in time, or the network path to the destination is lost.
    Nothing,
}

/// Who has the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The guest continues on the source.
    Source,
    /// It is the destination's.
    Destination,
    /// The source cannot know: the guest must not continue there automatically.
    Unknown,
}

impl LastWord {
    /// Decides who has the guest. `always_speaks` means that the destination never closes without SHUT; a connection
    /// that ends without it was then interrupted by the network. Any other destination, such as a QEMU, counts as
    /// failed when it closes the connection, as for a QEMU source.
    pub fn owner(self, always_speaks: bool) -> Owner {
        match self {
            Self::Shut(0) => Owner::Destination,
            Self::Shut(_) | Self::Nonsense => Owner::Source,
            Self::Closed if !always_speaks => Owner::Source,
            Self::Closed | Self::Nothing => Owner::Unknown,
        }
    }
}
