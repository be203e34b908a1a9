//! What precopy does not need and this library does not serve, with what to switch off instead.

use crate::{
    error::{Error, Place, Unsupported},
    format::{Command, SectionHead},
};

/// The error of a command that belongs to postcopy, COLO or the like.
pub(crate) fn command(command: &Command, at: Place) -> Error {
    let (what, capability) = match command {
        Command::PostcopyAdvise(None) => ("command POSTCOPY_ADVISE for dirty bitmaps", "dirty-bitmaps"),
        Command::PostcopyAdvise(Some(_)) => ("command POSTCOPY_ADVISE", "postcopy-ram"),
        Command::EnableColo => ("command ENABLE_COLO", "x-colo"),
        other => (other.refusal(), "postcopy-ram"),
    };
    Unsupported::Capability { what, capability }.at(at)
}

/// The error of a stream whose devices follow RAM without its END.
pub(crate) fn background_snapshot(at: Place) -> Error {
    let what = "a background snapshot (devices after RAM, without its end)";
    Unsupported::Capability { what, capability: "background-snapshot" }.at(at)
}

/// The error of a section that is sent in pieces and is not RAM. Its body has no length.
pub(crate) fn iterative_section(head: &SectionHead, at: Place) -> Error {
    let remedy = match head.name.as_bytes() {
        b"dirty-bitmap" => Some("switch capability dirty-bitmaps off at the source"),
        b"block" => Some("switch capability block off at the source and share or copy the disks instead"),
        name if name.ends_with(b"vfio") => Some("unplug the vfio device at the source"),
        _ => None,
    };
    Unsupported::Section { name: head.name.clone(), remedy }.at(at)
}
