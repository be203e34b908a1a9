//! The state of a machine in a qcow2 image, as one stream.
//!
//! ```text
//! position ─▶ entry of table 1, after those of the disk ─▶ table 2, kept while it is used ─▶ cluster ─▶ bytes
//! ```
//!
//! A cluster that is not there is zero. The memory is that of one table 2, at most 2 MiB.

use std::io::{self, Read};

use super::disk_image::{DiskImage, Geometry, Snapshot, Table, number, place, whole};
use crate::{
    error::{Error, Malformed, Unsupported},
    recording::Bytes,
};

/// The stream with which QEMU has saved a machine.
#[derive(Debug)]
pub struct VmState<'a, B> {
    file: &'a B,
    geometry: Geometry,
    table: Table,
    length: u64,
    position: u64,
    /// Table 2 of this entry of table 1; empty if it has none.
    current: Option<(u64, Vec<u8>)>,
}

impl<B: Bytes> DiskImage<B> {
    /// The stream with which QEMU has saved the machine of one of its snapshots.
    pub fn state(&self, of: &Snapshot) -> VmState<'_, B> {
        let Self { file, geometry, .. } = self;
        VmState { file, geometry: *geometry, table: of.table, length: of.state, position: 0, current: None }
    }
}

impl<B: Bytes> VmState<'_, B> {
    /// Reads some bytes; 0 at the end.
    fn some(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        let (span, cluster) = (self.geometry.span(), self.geometry.cluster);
        let within = self.position % cluster;
        let (at, unit) = self.place(self.position / span, self.position % span)?;
        let most = (unit - within % unit).min(self.length - self.position);
        let count = into.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        let into = into.get_mut(..count).unwrap_or_default();
        match at {
            None => into.fill(0),
            Some(at) => whole(self.file, into, at.saturating_add(within), "the state of a machine")?,
        }
        self.position += count as u64;
        Ok(count)
    }

    /// Where the cluster is that has this place of the state, and how many bytes are treated alike. `None` if it is zero.
    fn place(&mut self, index: u64, within: u64) -> Result<(Option<u64>, u64), Error> {
        let Geometry { cluster, is_extended } = self.geometry;
        let entry = usize::try_from(within / cluster * self.geometry.entry()).unwrap_or(usize::MAX);
        let table = self.second(index)?;
        let word = number(table, entry, 8);
        if word & COMPRESSED != 0 {
            let what = "a qcow2 image with a compressed cluster in the state of a machine";
            return Err(Unsupported::DiskImage(what).at(place(0)));
        }
        let at = Some(word & PLACE).filter(|at| *at != 0);
        if !is_extended {
            return Ok((at.filter(|_| word & ZERO == 0), cluster));
        }
        let part = within % cluster / (cluster / PARTS);
        let parts = number(table, entry + 8, 8);
        Ok((at.filter(|_| parts >> part & 1 == 1), cluster / PARTS))
    }

    /// Table 2 of an entry of table 1, counted from the beginning of the state.
    fn second(&mut self, index: u64) -> Result<&[u8], Error> {
        if self.current.as_ref().is_none_or(|(of, _)| *of != index) {
            let entry = self.table.first.saturating_add(index);
            if entry >= u64::from(self.table.entries) {
                let most = self.table.entries.into();
                return Err(Malformed::too_long("state of a machine, in entries", most, entry)
                    .at(place(self.table.at)));
            }
            let at = self.table.at.saturating_add(entry * 8);
            let mut word = [0; 8];
            whole(self.file, &mut word, at, "a table of a snapshot")?;
            let from = u64::from_be_bytes(word) & PLACE;
            let mut table = Vec::new();
            if from != 0 {
                table.resize(usize::try_from(self.geometry.cluster).unwrap_or(usize::MAX), 0);
                whole(self.file, &mut table, from, "a table of a snapshot")?;
            }
            self.current = Some((index, table));
        }
        Ok(self.current.as_ref().map(|(_, table)| &**table).unwrap_or_default())
    }
}

impl<B: Bytes> Read for VmState<'_, B> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.length || into.is_empty() {
            return Ok(0);
        }
        self.some(into).map_err(io::Error::other)
    }
}

/// The bits of an entry that are a place in the file.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Parts of a cluster, if entries are extended.
const PARTS: u64 = 32;
