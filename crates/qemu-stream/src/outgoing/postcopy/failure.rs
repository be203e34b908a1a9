//! How post-copy fails: the cause, and which side has the guest.

use multifd::Error;

/// Which side has the guest after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestAt {
    /// The guest has not started at the destination. It is where it was, and the migration can begin anew.
    Source,
    /// The destination was sent the command to start the guest. It runs there, or waits for a page. Only
    /// [`resume`](super::PostcopySource::resume) is safe: a second start of the guest would give its disks two users.
    Destination,
}

/// A failure of post-copy.
#[derive(Debug, thiserror::Error)]
#[error("{}", match guest {
    GuestAt::Source => "the guest was not started at the destination, and can be sent again",
    GuestAt::Destination => "the guest belongs to the destination, which was sent the command to start it: resume this migration. \
                             Before you start the guest anywhere else, make sure that the destination has ended",
})]
pub struct PostcopyError {
    /// Which side has the guest.
    pub guest: GuestAt,
    /// Whether the destination has confirmed that it runs the guest. Without it, [`GuestAt::Destination`] means that it may.
    pub is_confirmed: bool,
    /// What has failed.
    #[source]
    pub error: Error,
}
