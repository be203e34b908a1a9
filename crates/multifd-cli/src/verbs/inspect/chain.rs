//! The files of a machine that is in a delta and its bases.

use indicatif::{BinaryBytes, HumanCount};
use qemu_stream::mapped_ram::{ChainFile, StoredMachine};
use serde::Serialize;

use crate::{about::About, output::outlet::shown, stored};

/// One file.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Link {
    file: String,
    #[serde(skip_serializing_if = "is_zero")]
    offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    root: Option<String>,
    /// The root of its base; none for the last one, which is a whole machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    /// Pages that are in this file.
    pages: u64,
    on_disk: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
}

/// The files, newest first; none if there is only one.
pub(super) fn of(machine: &StoredMachine) -> Result<Vec<Link>, qemu_stream::Error> {
    match machine.files() {
        [_] => Ok(Vec::new()),
        files => files.iter().map(Link::of).collect(),
    }
}

impl Link {
    fn of(file: &ChainFile) -> Result<Self, qemu_stream::Error> {
        let pages = file.blocks().iter().map(|(index, _)| Ok(file.bitmap(index)?.count()));
        let About { created, label, .. } = About::read(file.about());
        Ok(Self {
            file: shown(file.path()),
            offset: file.offset(),
            root: file.root().map(|root| root.to_string()),
            base: file.base().map(|base| base.root.to_string()),
            pages: pages.sum::<Result<_, qemu_stream::Error>>()?,
            on_disk: on_disk(file),
            created,
            label,
        })
    }
}

/// The bytes that a file occupies. A file that cannot be asked has no size that could be shown.
fn on_disk(file: &ChainFile) -> u64 {
    stored::on_disk(file.file())
}

/// A line for each file.
pub(super) fn lines(chain: &[Link]) -> Vec<String> {
    let line = |(number, link): (usize, &Link)| {
        let Link { file, pages, on_disk, created, label, .. } = link;
        let kind = if number + 1 < chain.len() { "pages that differ from" } else { "pages, a whole machine" };
        let next = chain.get(number + 1).map(|base| format!(" {}", base.file)).unwrap_or_default();
        let when = created.as_ref().map(|time| format!(", {time}")).unwrap_or_default();
        let label = label.as_ref().map(|label| format!(", {label}")).unwrap_or_default();
        let name = if number == 0 { "chain" } else { "" };
        format!(
            "{name:<10} {file}: {} {kind}{next}, {} on disk{when}{label}",
            HumanCount(*pages),
            BinaryBytes(*on_disk)
        )
    };
    chain.iter().enumerate().map(line).collect()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the serializer passes a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}
