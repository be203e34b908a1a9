//! Chooses a snapshot in a qcow2 image: the one that the address names, or the only one with a machine. The image stays open, so that
//! the machine is read from the file in which it was found.

use std::{fmt::Write as _, io};

use qemu_stream::stored::{DiskImage, Snapshot, VmState};

use super::Within;
use crate::file_address::FileAddress;

/// An image, and the snapshot in it that is meant.
#[derive(Debug)]
pub(super) struct ChosenSnapshot {
    image: DiskImage<Within>,
    snapshot: Snapshot,
}

impl ChosenSnapshot {
    /// Opens the image.
    pub(super) fn open(at: &FileAddress) -> io::Result<Self> {
        let image = DiskImage::open(Within::open(at)?).map_err(|error| match error {
            // The cause would be hidden otherwise.
            qemu_stream::Error::Io { source, .. } => source,
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        })?;
        let snapshot = choose(image.snapshots(), at)?;
        Ok(Self { image, snapshot })
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The stream with which QEMU has saved its machine.
    pub(super) fn state(&self) -> VmState<'_, Within> {
        self.image.state(&self.snapshot)
    }
}

fn choose(all: &[Snapshot], at: &FileAddress) -> io::Result<Snapshot> {
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    let Some(wanted) = at.snapshot() else {
        let mut with_machine = all.iter().filter(|snapshot| snapshot.state > 0);
        return match (with_machine.next(), with_machine.next()) {
            (Some(only), None) => Ok(only.clone()),
            (None, _) => refused(format!(
                "it is a qcow2 image {}; QEMU saves a machine in the image of its first disk",
                if all.is_empty() {
                    "without snapshots (savevm NAME)"
                } else {
                    "whose snapshots have no machine"
                }
            )),
            _ => refused(format!(
                "it is a qcow2 image with several snapshots; file:IMAGE,snapshot=NAME names one of them:{}",
                names(all)
            )),
        };
    };
    let named = all.iter().find(|snapshot| snapshot.name.as_raw() == wanted);
    match named.or_else(|| all.iter().find(|snapshot| snapshot.id.as_raw() == wanted)) {
        Some(found) if found.state > 0 => Ok(found.clone()),
        Some(_) => refused(format!(
            "snapshot {wanted:?} in it has no machine: QEMU saves it in the image of the first disk"
        )),
        None => refused(format!("it has no snapshot {wanted:?}; it has:{}", names(all))),
    }
}

fn names(all: &[Snapshot]) -> String {
    let mut names = String::new();
    for snapshot in all.iter().filter(|snapshot| snapshot.state > 0).take(SHOWN) {
        let _ = write!(names, " {}", snapshot.name);
    }
    if all.len() > SHOWN {
        names.push_str(" ...");
    }
    names
}

/// Names that are listed.
const SHOWN: usize = 20;
