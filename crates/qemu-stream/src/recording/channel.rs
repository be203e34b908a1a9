//! The packets of a channel.

use std::{io::Read, time::Duration};

use multifd::{
    ram::PageSize,
    wire::{COMMON_LEN, ChannelId, DEVICE_STATE_LEN, DeviceState, INITIAL_LEN, Initial, Packet, head_len},
};

use super::{Bytes, OneWay};

/// What a channel has carried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChannelLine {
    /// Packets, SYNC packets included.
    pub packets: u64,
    /// Pages with data.
    pub normal: u64,
    /// Zero pages.
    pub zero: u64,
    /// Bytes after the heads of packets.
    pub payload: u64,
    /// When each SYNC packet arrived.
    pub syncs: Vec<Duration>,
    /// Why it cannot be parsed to its end.
    pub unreadable: Option<String>,
}

/// The id of the channel that begins with these bytes.
pub(super) fn id(bytes: &[u8]) -> Option<ChannelId> {
    let initial = bytes.first_chunk::<INITIAL_LEN>()?;
    Initial::decode(initial).ok().map(|initial| initial.id)
}

impl ChannelLine {
    /// Reads all packets of a machine with this page size.
    pub(super) fn read<B: Bytes>(mut way: OneWay<'_, B>, page_size: PageSize) -> Self {
        let mut found = Self::default();
        let mut head = vec![0; head_len(page_size)];
        if let Err(why) = found.packets(&mut way, page_size, &mut head) {
            found.unreadable = Some(why);
        }
        found
    }

    fn packets<B: Bytes>(
        &mut self,
        way: &mut OneWay<'_, B>,
        page_size: PageSize,
        head: &mut [u8],
    ) -> Result<(), String> {
        let failed = |error: crate::Error| error.to_string();
        way.skip(INITIAL_LEN as u64).map_err(failed)?;
        let mut position = INITIAL_LEN as u64;
        loop {
            let (common, rest) = head.split_at_mut(COMMON_LEN);
            if !fill(way, common)? {
                return Ok(());
            }
            let payload = if common.first_chunk().is_some_and(DeviceState::is_begun_by) {
                let (rest, _) = rest.split_at_mut(DEVICE_STATE_LEN - COMMON_LEN);
                whole(way, rest)?;
                position += DEVICE_STATE_LEN as u64;
                let head = head.first_chunk().ok_or("a head that is too short")?;
                u64::from(DeviceState::decode(head).map_err(|error| error.to_string())?.payload_len)
            } else {
                whole(way, rest)?;
                position += head.len() as u64;
                let packet = Packet::decode(head, page_size).map_err(|error| error.to_string())?;
                self.normal += packet.normal().count() as u64;
                self.zero += packet.zero().count() as u64;
                if packet.is_sync() {
                    self.syncs.push(way.arrived(position - 1));
                }
                packet.payload_len.into()
            };
            self.packets += 1;
            self.payload += payload;
            position += payload;
            if way.skip(payload).map_err(failed)? < payload {
                return Err("it ends within the pages of a packet".to_owned());
            }
        }
    }
}

/// `false` at the end of the direction.
fn fill<B: Bytes>(way: &mut OneWay<'_, B>, into: &mut [u8]) -> Result<bool, String> {
    let mut done = 0;
    while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match way.read(rest).map_err(|error| error.to_string())? {
            0 if done == 0 => return Ok(false),
            0 => return Err("it ends within the head of a packet".to_owned()),
            count => done += count,
        }
    }
    Ok(true)
}

fn whole<B: Bytes>(way: &mut OneWay<'_, B>, into: &mut [u8]) -> Result<(), String> {
    if fill(way, into)? { Ok(()) } else { Err("it ends within the head of a packet".to_owned()) }
}
