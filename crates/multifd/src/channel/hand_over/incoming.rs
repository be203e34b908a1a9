//! The destination's side.

use std::{
    io::{self, IoSliceMut},
    mem::{self, MaybeUninit},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::{
    SharedMemory,
    packet::{self, HEAD, Head, MAGIC, MOST},
};
use crate::{
    channel::{Address, Context, Host, Link, Listen, Listener, PeerSignal, SocketLink, Wake},
    error::{Error, Result, Usage, Violation},
    ram::{Part, PartMut},
};

/// Listens for a source that [hands memory over](super::HandOver).
#[derive(Debug)]
pub struct HandOverListener {
    listener: Listener,
    arrived: Arrived,
}

/// The memory that a source has handed over, as soon as its main connection is there.
#[derive(Debug)]
pub struct HandedOver(Arrived);

/// What connections have brought that are still open, each with a number.
type Arrived = Arc<Mutex<Vec<(u64, Vec<SharedMemory>)>>>;

impl HandOverListener {
    /// Listens at `address`, a unix socket for the owner of this process alone.
    ///
    /// # Errors
    /// As [`Listener::bind`]; [`Usage::HandOver`] within the error if the address is another one.
    pub fn bind(address: &Address) -> io::Result<(Self, HandedOver)> {
        if !matches!(address, Address::Unix(_)) {
            return Err(io::Error::other(Usage::HandOver { why: format!("{address} is not a unix socket") }));
        }
        let arrived = Arrived::default();
        Ok((Self { listener: Listener::bind(address)?, arrived: arrived.clone() }, HandedOver(arrived)))
    }

    fn link(&self, link: Option<SocketLink>) -> Option<Box<dyn Link>> {
        // Relaxed: each number is taken once, and orders nothing.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let arrived = self.arrived.clone();
        Some(Box::new(HandedLink {
            link: link?,
            arrived,
            number,
            state: State::Packet(Vec::new(), Vec::new()),
        }))
    }
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl HandedOver {
    /// Takes the memory. Call it when the source has announced its blocks.
    ///
    /// # Errors
    /// [`Violation::HandOver`] if the source has handed over nothing, or two connections have.
    pub fn take(&self) -> Result<Vec<SharedMemory>> {
        let mut arrived = lock(&self.0);
        match arrived.len() {
            1 => Ok(arrived.pop().map(|(_, memory)| memory).unwrap_or_default()),
            0 => Err(Violation::HandOver { what: "it has handed over no memory".into() }.into()),
            many => {
                Err(Violation::HandOver { what: format!("{many} connections handed memory over") }.into())
            }
        }
    }
}

impl Listen for HandOverListener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        let link = self.listener.accept_link(context)?;
        Ok(self.link(link))
    }

    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        let link = self.listener.accept_waiting_link(context)?;
        Ok(self.link(link))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.listener.waker()
    }

    fn address(&self) -> String {
        self.listener.address()
    }
}

/// A connection that may begin with a packet.
struct HandedLink {
    link: SocketLink,
    arrived: Arrived,
    number: u64,
    state: State,
}

enum State {
    /// What was received of the packet.
    Packet(Vec<u8>, Vec<OwnedFd>),
    /// The packet was received, or it is none: then these are the first bytes of the connection.
    Passed(Vec<u8>),
}

impl HandedLink {
    /// Receives more of the packet.
    fn packet(&mut self) -> io::Result<()> {
        let State::Packet(bytes, descriptors) = &mut self.state else { return Ok(()) };
        let wanted = match bytes.first_chunk::<HEAD>() {
            None if bytes.len() < MAGIC.len() => MAGIC.len(),
            None => HEAD,
            Some(head) => HEAD + packet::head(*head).map_err(invalid)?.rest,
        };
        if bytes.len() < wanted {
            // No more than the packet: the main stream follows.
            let mut piece = vec![0; wanted - bytes.len()];
            let count = receive(&mut self.link, &mut piece, descriptors)?;
            if count == 0 {
                // The end of the connection is for the reader.
                self.state = State::Passed(mem::take(bytes));
                return Ok(());
            }
            bytes.extend(piece.get(..count).unwrap_or_default());
        }
        if bytes.len() >= MAGIC.len() && !bytes.starts_with(&MAGIC) {
            self.state = State::Passed(mem::take(bytes));
        } else if let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() {
            let head: Head = packet::head(*head).map_err(invalid)?;
            if rest.len() == head.rest {
                let memory = packet::memory(head, rest, mem::take(descriptors)).map_err(invalid)?;
                if !memory.is_empty() {
                    lock(&self.arrived).push((self.number, memory));
                }
                self.state = State::Passed(Vec::new());
            }
        }
        Ok(())
    }
}

impl Drop for HandedLink {
    fn drop(&mut self) {
        lock(&self.arrived).retain(|(number, _)| *number != self.number);
    }
}

fn lock(arrived: &Arrived) -> MutexGuard<'_, Vec<(u64, Vec<SharedMemory>)>> {
    arrived.lock().unwrap_or_else(PoisonError::into_inner)
}

fn invalid(violation: Violation) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Error::from(violation))
}

/// Receives bytes, and the descriptors that come with them.
fn receive(link: &mut SocketLink, into: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    link.recv_by(|socket| {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                descriptors.extend(more);
            }
        }
        Ok(received.bytes)
    })
}

impl Link for HandedLink {
    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        self.link.send(parts)
    }

    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        while matches!(self.state, State::Packet(..)) {
            self.packet()?;
        }
        match &mut self.state {
            State::Passed(bytes) if !bytes.is_empty() => {
                let mut copied = 0;
                for part in parts {
                    copied += part.copy_from(bytes.get(copied..).unwrap_or_default());
                }
                bytes.drain(..copied);
                Ok(copied)
            }
            _ => self.link.recv(parts),
        }
    }

    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.link.set_recv_timeout(limit)
    }

    fn is_readable(&mut self) -> io::Result<bool> {
        match &self.state {
            State::Passed(bytes) if !bytes.is_empty() => Ok(true),
            _ => self.link.is_readable(),
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.link.waker()
    }

    fn send_waker(&self) -> Arc<dyn Wake> {
        self.link.send_waker()
    }

    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.link.recv_waker()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.link.peer_signal()
    }

    fn limit_backlog(&mut self, limit: Option<u64>) {
        self.link.limit_backlog(limit);
    }

    fn round_trip(&self) -> Option<Duration> {
        self.link.round_trip()
    }

    fn peer(&self) -> String {
        self.link.peer()
    }

    fn host(&self) -> Option<Host> {
        self.link.host()
    }

    fn close_send(&mut self) -> io::Result<()> {
        self.link.close_send()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }
}
