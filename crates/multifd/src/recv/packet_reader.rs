//! Reads packets from a channel's connection: heads and payloads. The pages of a packet and the head of the next one are
//! received in one call: pages where they belong, the head into the reader's buffer.

use std::io;

use arrayvec::ArrayVec;

use crate::{
    channel::{Link, recv_at_least},
    error::{Error, Result, Unsupported, Violation},
    ram::{MAX_PARTS, PartMut},
    wire::{COMMON_LEN, DEVICE_STATE_LEN, DeviceState},
};

/// A connection, and the bytes of the next head that have arrived.
pub(super) struct PacketReader {
    link: Box<dyn Link>,
    head: Box<[u8]>,
    have: usize,
}

impl PacketReader {
    /// A reader of `link`, with space for the part that all heads have in common.
    pub(super) fn new(link: Box<dyn Link>) -> Self {
        Self { link, head: vec![0; COMMON_LEN].into(), have: 0 }
    }

    /// Whether no byte of the next head has arrived.
    pub(super) fn is_empty(&self) -> bool {
        self.have == 0
    }

    /// Completes a head and returns it. `None` if the peer has closed the connection between two packets.
    pub(super) fn head(&mut self) -> Result<Option<&[u8]>> {
        let begun = self.at_least(COMMON_LEN)?;
        // The head of a device-state packet is shorter: a wait for more of it might never end.
        if begun
            && self.head.first_chunk().is_some_and(DeviceState::is_begun_by)
            && self.at_least(DEVICE_STATE_LEN)?
            && let Some(head) = self.head.first_chunk()
        {
            let DeviceState { device, instance, .. } = DeviceState::decode(head)?;
            return Err(Unsupported::DeviceState { device, instance }.into());
        }
        if begun && self.at_least(self.head.len())? {
            self.have = 0;
            Ok(Some(&self.head))
        } else if self.is_empty() {
            Ok(None)
        } else {
            let (expected, found) = (self.head.len() as u64, self.have as u64);
            Err(Violation::Cut { what: "a packet head", expected, found }.into())
        }
    }

    /// Makes space for whole heads.
    pub(super) fn lengthen(&mut self, head_len: usize) {
        let mut head = std::mem::take(&mut self.head).into_vec();
        head.resize(head_len, 0);
        self.head = head.into();
    }

    /// Receives until `length` bytes of the head have arrived. `false` if the peer closes the connection before.
    pub(super) fn at_least(&mut self, bytes: usize) -> Result<bool> {
        if self.have < bytes {
            let room = self.head.get_mut(self.have..).expect("a head does not exceed its room");
            let received = recv_at_least(&mut *self.link, &mut [PartMut::from(room)], bytes - self.have)
                .map_err(|error| self.broken(error))?;
            self.have += received;
        }
        Ok(self.have >= bytes)
    }

    /// Receives `length` bytes of payload into `parts`, and those bytes of the next head that have arrived.
    pub(super) fn payload(&mut self, parts: ArrayVec<PartMut<'_>, MAX_PARTS>, length: usize) -> Result<()> {
        let received = {
            let mut parts = parts;
            parts.push(PartMut::from(&mut *self.head));
            recv_at_least(&mut *self.link, &mut parts, length)
        };
        let received = received.map_err(|error| self.broken(error))?;
        if received < length {
            let (expected, found) = (length as u64, received as u64);
            return Err(Violation::Cut { what: "a packet's pages", expected, found }.into());
        }
        self.have = received - length;
        Ok(())
    }

    fn broken(&self, error: io::Error) -> Error {
        Error::io(format!("receive from {}", self.link.peer()), error)
    }
}
