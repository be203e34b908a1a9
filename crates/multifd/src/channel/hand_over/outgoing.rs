//! The source's side.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{
    SharedMemory,
    packet::{self, MOST},
};
use crate::{
    channel::{Address, Connect, Context, Link, SocketLink, connect::connect_unix},
    error::{Error, Result, Usage},
    ram::RamBlocks,
};

/// Connects to a [`HandOverListener`](super::HandOverListener) and hands memory over: the address of a source.
#[derive(Debug)]
pub struct HandOver {
    address: Address,
    memory: Vec<SharedMemory>,
    packet: Vec<u8>,
}

impl HandOver {
    /// Prepares to hand over the `memory` of all ignored blocks to the process that listens at `address`, a unix socket. Nothing
    /// is connected. A migration with it has no channels.
    ///
    /// # Errors
    /// [`Usage::HandOver`] if the address is another one, an ignored block is missing in `memory`, a block in it is not one of these,
    /// or the system does not have this part of the file mapped where the block is.
    pub fn new(address: &Address, blocks: &RamBlocks, memory: Vec<SharedMemory>) -> Result<Self> {
        let refused = |why: String| Error::from(Usage::HandOver { why });
        if !matches!(address, Address::Unix(_)) {
            return Err(refused(format!("{address} is not a unix socket")));
        }
        for (_, block) in blocks.iter().filter(|(_, block)| block.is_ignored()) {
            let name = block.name();
            let mut of_block = memory.iter().filter(|shared| shared.block == *name);
            let shared = of_block.next().ok_or_else(|| refused(format!("block {name:?} has no file")))?;
            if of_block.next().is_some() {
                return Err(refused(format!("block {name:?} has two files")));
            }
            if shared.length != block.used_length() {
                let (given, found) = (shared.length, block.used_length());
                return Err(refused(format!("block {name:?} has {found:#x} bytes, not {given:#x}")));
            }
            block.check_mapped_from(&shared.file, shared.offset).map_err(|why| refused(why.to_string()))?;
        }
        if let Some(other) = memory.iter().find(|shared| {
            let block = blocks.find(shared.block.as_bytes()).and_then(|index| blocks.get(index));
            !block.is_some_and(crate::ram::RamBlock::is_ignored)
        }) {
            let name = &other.block;
            return Err(refused(format!(
                "block {name:?} does not exist, or is not ignored, so it would be sent as well"
            )));
        }
        let packet = packet::encode(&memory);
        let packet = packet.ok_or_else(|| refused(format!("there are more than {MOST} blocks")))?;
        Ok(Self { address: address.clone(), memory, packet })
    }
}

impl Connect for HandOver {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        let socket = connect_unix(&self.address, context)?;
        let link = SocketLink::new(socket, context)?;
        send(link.socket(), &self.packet, &self.memory)?;
        Ok(Box::new(link))
    }

    fn target(&self) -> String {
        self.address.to_string()
    }

    fn is_single(&self) -> bool {
        true
    }
}

/// Sends the packet with the descriptors. It fits into the buffer of a new socket, so this does not wait for the other side.
fn send(socket: BorrowedFd<'_>, packet: &[u8], memory: &[SharedMemory]) -> io::Result<()> {
    let descriptors: Vec<_> = memory.iter().map(|shared| shared.file.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(&descriptors).size()];
    let mut sent = 0;
    while let Some(rest) = packet.get(sent..).filter(|rest| !rest.is_empty()) {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, &[IoSlice::new(rest)], &mut control, flags) {
            Ok(count) => sent += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
