//! The limit: the same memory over the same sockets, and nothing else.
//!
//! No format, no zero test, no hand-over: a thread a connection sends a head of a packet's length and 512 KiB in one call,
//! its share of RAM one after the other; a thread a connection receives them into fresh memory. What the engine takes more
//! than this is the engine's; the rest is the system's.

use std::{
    io::Read,
    net::{Shutdown, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use multifd::{
    channel::{Address, Connect, Link, Listen, Listener, Stop},
    ram::{Mapping, Memory, PageIndex, PageSize, Part, PartMut, RamBlock, RamBlocks, advance_mut},
    wire::head_len,
};

use super::{Go, RAM, lend::Lender};
use crate::Result;

/// Pages of a packet.
const PAGES: u64 = 128;
/// Bytes of a number in a head.
const NUMBER: usize = 8;

/// Sends all of RAM, its pages copied into sockets, or lent to them.
pub(super) fn send(go: &Go, blocks: &RamBlocks, lent: bool) -> Result<()> {
    let block = blocks.block(blocks.find(RAM.as_bytes()).ok_or("no RAM")?)?;
    let address: Address = go.address.parse()?;
    let share = u64::from(go.channels);
    thread::scope(|scope| {
        let senders: Vec<_> = (0..share)
            .map(|first| {
                let address = &address;
                scope.spawn(move || {
                    let packets = (first..block.pages() / PAGES).step_by(usize::try_from(share)?);
                    if lent {
                        lend_share(address, block, packets)
                    } else {
                        send_share(address, block, packets)
                    }
                })
            })
            .collect();
        senders.into_iter().try_for_each(|sender| sender.join().map_err(|_| "a sender panicked")?)
    })
}

fn send_share(address: &Address, block: &RamBlock, packets: impl Iterator<Item = u64>) -> Result<()> {
    let mut link = address.connect(&Stop::new(), Duration::from_secs(30))?;
    let mut head = vec![1; head_len(PageSize::KIB_4)];
    for packet in packets {
        head[..NUMBER].copy_from_slice(&packet.to_be_bytes());
        let pages = block.slice(PageIndex(packet * PAGES), PAGES).ok_or("pages")?;
        let sent = link.send(&[Part::from(&head[..]), Part::from(pages)])?;
        if sent != head.len() + pages.len() {
            return Err("a short send".into());
        }
    }
    link.close_send()?;
    // The other end closes when it has everything.
    while link.recv(&mut [PartMut::from(&mut head[..])])? > 0 {}
    Ok(())
}

fn lend_share(address: &Address, block: &RamBlock, packets: impl Iterator<Item = u64>) -> Result<()> {
    let Address::Tcp { host, port, .. } = address else { return Err("expected a tcp address".into()) };
    let mut lender = Lender::new(TcpStream::connect((host.as_str(), *port))?)?;
    let mut head = vec![1; head_len(PageSize::KIB_4)];
    for packet in packets {
        head[..NUMBER].copy_from_slice(&packet.to_be_bytes());
        lender.send(&head, block.slice(PageIndex(packet * PAGES), PAGES).ok_or("pages")?)?;
    }
    lender.socket().shutdown(Shutdown::Write)?;
    while lender.socket().read(&mut head)? > 0 {}
    Ok(())
}

/// Receives `ram` bytes over so many connections.
pub(super) fn receive(mut listener: Listener, ram: u64, channels: u8) -> Result<Arc<RamBlocks>> {
    let name = multifd::ram::BlockName::new(RAM).ok_or("a block's name")?;
    let block = RamBlock::new(name, ram, PageSize::KIB_4, Memory::Mapped(Mapping::anonymous(ram)?))?;
    let mut links = Vec::new();
    while links.len() < usize::from(channels) {
        links.push(listener.accept()?.ok_or("the listener was woken")?);
    }
    thread::scope(|scope| {
        let block = &block;
        let receivers: Vec<_> =
            links.into_iter().map(|link| scope.spawn(move || receive_from(link, block))).collect();
        receivers.into_iter().try_for_each(|receiver| receiver.join().map_err(|_| "a receiver panicked")?)
    })?;
    Ok(Arc::new(RamBlocks::new(vec![block])?))
}

fn receive_from(mut link: Box<dyn Link>, block: &RamBlock) -> Result<()> {
    let mut head = vec![0; head_len(PageSize::KIB_4)];
    loop {
        if !all(&mut *link, &mut [PartMut::from(&mut head[..])])? {
            return Ok(());
        }
        let number = head.first_chunk::<NUMBER>().ok_or("a head")?;
        let first = PageIndex(u64::from_be_bytes(*number) * PAGES);
        let pages = block.slice(first, PAGES).ok_or("pages")?;
        if !all(&mut *link, &mut [PartMut::from(pages)])? {
            return Err("it ends within a packet".into());
        }
    }
}

/// Fills the parts; `false` if the other end has closed.
fn all(link: &mut dyn Link, mut parts: &mut [PartMut<'_>]) -> Result<bool> {
    while !parts.is_empty() {
        match link.recv(parts)? {
            0 => return Ok(false),
            some => parts = advance_mut(parts, some),
        }
    }
    Ok(true)
}
