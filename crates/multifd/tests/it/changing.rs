//! Connections on which a packet is changed on its way.

use std::{io, sync::Arc, time::Duration};

use multifd::{
    Method, ReceiveOptions, Receiver, Result, SendOptions, Sender,
    channel::{Connect, Context, Host, Link, PeerSignal, Stop, Wake, memory},
    ram::{BlockIndex, PageIndex, PageSize, Part, PartMut, RamBlocks},
    wire::head_len,
};

use crate::kit::{Ends, fresh, spawn, write};

/// A connection that changes what its channel sends.
struct Changing {
    link: Box<dyn Link>,
    change: fn(&mut Vec<u8>),
    /// It has cut something, and takes no notice of what comes after that: a source that fails as well would hang up, and
    /// what is on its way in memory would be lost.
    cut: bool,
}

impl Link for Changing {
    fn is_readable(&mut self) -> io::Result<bool> {
        self.link.is_readable()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.link.peer_signal()
    }

    fn host(&self) -> Option<Host> {
        self.link.host()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }

    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let mut bytes = Vec::new();
        for part in parts {
            let start = bytes.len();
            bytes.resize(start + part.len(), 0);
            part.copy_to(&mut bytes[start..]);
        }
        let length = bytes.len();
        if self.cut {
            return Ok(length);
        }
        if length > head_len(PageSize::KIB_4) {
            (self.change)(&mut bytes);
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let sent = self.link.send(&[rest.into()])?;
            rest = &rest[sent..];
        }
        if bytes.len() < length {
            self.link.close_send()?;
            self.cut = true;
        }
        Ok(length)
    }
    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        self.link.recv(parts)
    }
    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.link.set_recv_timeout(limit)
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
    fn peer(&self) -> String {
        self.link.peer()
    }
    fn close_send(&mut self) -> io::Result<()> {
        self.link.close_send()
    }
}

pub(crate) struct ChangingConnector(pub(crate) memory::MemoryConnector, pub(crate) fn(&mut Vec<u8>));

impl Connect for ChangingConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Changing { link: self.0.connect(context)?, change: self.1, cut: false }))
    }
    fn target(&self) -> String {
        self.0.target()
    }
}

/// The same, over connections of the caller's choice.
pub(crate) fn answer_over(
    (connector, listener): Ends,
    method: Method,
    choice: Option<Method>,
) -> (Result<()>, Arc<RamBlocks>) {
    const RAM: &[(&str, u64)] = &[("pc.ram", 256 << 10)];
    let (source, destination) = (fresh(PageSize::KIB_4, RAM), fresh(PageSize::KIB_4, RAM));
    (0..64).for_each(|page| write(&source, 0, page, page * page));
    let options = ReceiveOptions::new().channels(multifd::ChannelCount::Exact(1)).method(choice);
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(listener).expect("listening");
    receiver.set_blocks(destination.clone()).expect("set");
    let options = SendOptions::new().channels(1).method(method);
    let mut sender = Sender::new(options, source, Stop::new()).expect("made");
    sender.set_up(connector).expect("set up");
    let sent = spawn("source", move || {
        for page in 0..64 {
            sender.queue(BlockIndex(0), PageIndex(page)).expect("queued");
        }
        // The destination hangs up in the middle of it.
        let _ = sender.sync();
        // Dropped now, it would shut its connections down, and what is on its way in memory would be lost.
        sender
    });
    let answer = receiver.sync();
    drop(receiver);
    drop(sent.join().expect("no panic"));
    (answer, destination)
}
