//! Who has the guest, when everything has been sent: what a source makes of the last thing that it hears.
//!
//! ```text
//! source: everything ─▶ destination: restores ─ looks at main ─▶ SHUT 0, and runs the guest
//!         cancelled ── closes its sending side ─▶            └─▶ SHUT 1, if the source has closed or anything failed
//! ```
//!
//! A destination that looks at main after the source has closed it says SHUT 1; one that has said SHUT 0 before is heard, or
//! not: then nobody here can know.

/// The last thing that a source hears of its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWord {
    /// SHUT, with this code: 0 is success.
    Shut(u32),
    /// Something that breaks the protocol's rules, in the place of SHUT, or a TLS alert: it is the destination's own.
    Nonsense,
    /// The connection was closed, or reset, and there was no SHUT.
    Closed,
    /// Nothing came in time, or the way to the destination is gone.
    Nothing,
}

/// Who has the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// It goes on at the source.
    Source,
    /// It is the destination's.
    Destination,
    /// Nobody at the source can know: it must not go on there by itself.
    Unknown,
}

impl LastWord {
    /// Who has the guest after this. `always_speaks` says that the destination never closes without SHUT, so that a
    /// connection which ends without one was ended by something between the two. Any other destination, a QEMU say, is taken
    /// for failed when it closes, as a QEMU source takes it.
    pub fn owner(self, always_speaks: bool) -> Owner {
        match self {
            Self::Shut(0) => Owner::Destination,
            Self::Shut(_) | Self::Nonsense => Owner::Source,
            Self::Closed if !always_speaks => Owner::Source,
            Self::Closed | Self::Nothing => Owner::Unknown,
        }
    }
}
