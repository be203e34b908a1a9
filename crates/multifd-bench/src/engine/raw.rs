//! The limit: the same memory over the same sockets, and nothing else.
//!
//! There is no format, no zero test and no hand-over. One thread per connection sends its share of RAM: a head of a
//! packet's length and up to 512 KiB in one call. One thread per connection receives them into fresh memory. Both know
//! which pages are zero, and leave them out. The time beyond this is the engine's; the rest is the system's.

use std::{
    io::Read,
    net::{Shutdown, TcpStream},
    sync::Arc,
    thread,
};

use multifd::{
    channel::{Address, Connect, Context, Link, Listen, Listener, Stop},
    ram::{
        GuestSlice, Mapping, Memory, PageIndex, PageSize, Part, PartMut, RamBlock, RamBlocks, advance_mut,
    },
    wire::head_len,
};

use super::{Go, RAM, lend::Lender};
use crate::{Result, contents::Contents};

/// Pages of a packet.
const PAGES: u64 = 128;
/// Bytes of a number in a head.
const NUMBER: usize = 8;

/// Sends RAM; its pages are copied into sockets, or all are lent to them. Returns the number of bytes.
pub(super) fn send(go: &Go, blocks: &RamBlocks, contents: Contents, lent: bool) -> Result<u64> {
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
                        send_share(address, block, contents, packets)
                    }
                })
            })
            .collect();
        senders.into_iter().map(|sender| sender.join().map_err(|_| "a sender panicked")?).sum()
    })
}

fn send_share(
    address: &Address,
    block: &RamBlock,
    contents: Contents,
    packets: impl Iterator<Item = u64>,
) -> Result<u64> {
    let mut bytes = 0;
    let mut link = address.connect(&Context::new(&Stop::new()))?;
    let mut head = vec![1; head_len(PageSize::KIB_4)];
    for packet in packets {
        head[..NUMBER].copy_from_slice(&packet.to_be_bytes());
        let mut parts = vec![Part::from(&head[..])];
        parts.extend(runs(block, contents, packet)?.into_iter().map(Part::from));
        let sent = link.send(&parts)?;
        if sent != parts.iter().map(Part::len).sum::<usize>() {
            return Err("a short send".into());
        }
        bytes += sent as u64;
    }
    link.close_send()?;
    // The other end closes when it has everything.
    while link.recv(&mut [PartMut::from(&mut head[..])])? > 0 {}
    Ok(bytes)
}

fn lend_share(address: &Address, block: &RamBlock, packets: impl Iterator<Item = u64>) -> Result<u64> {
    let mut bytes = 0;
    let Address::Tcp { host, port, .. } = address else { return Err("expected a tcp address".into()) };
    let mut lender = Lender::new(TcpStream::connect((host.as_str(), *port))?)?;
    let mut head = vec![1; head_len(PageSize::KIB_4)];
    for packet in packets {
        head[..NUMBER].copy_from_slice(&packet.to_be_bytes());
        let pages = block.slice(PageIndex(packet * PAGES), PAGES).ok_or("pages")?;
        lender.send(&head, pages)?;
        bytes += (head.len() + pages.len()) as u64;
    }
    lender.socket().shutdown(Shutdown::Write)?;
    while lender.socket().read(&mut head)? > 0 {}
    Ok(bytes)
}

/// A packet's pages that are not zero, with adjacent pages combined.
fn runs(block: &RamBlock, contents: Contents, packet: u64) -> Result<Vec<GuestSlice<'_>>> {
    let pages: Vec<u64> =
        (packet * PAGES..(packet + 1) * PAGES).filter(|page| !contents.is_zero(*page)).collect();
    let runs = pages.chunk_by(|page, next| page + 1 == *next);
    runs.map(|run| Ok(block.slice(PageIndex(run[0]), run.len() as u64).ok_or("pages")?)).collect()
}

/// Receives `ram` bytes over this number of connections.
pub(super) fn receive(
    mut listener: Listener,
    ram: u64,
    contents: Contents,
    channels: u8,
) -> Result<Arc<RamBlocks>> {
    let name = multifd::ram::BlockName::new(RAM).ok_or("a block's name")?;
    let block = RamBlock::new(name, ram, PageSize::KIB_4, Memory::Mapped(Mapping::anonymous(ram)?))?;
    let (mut links, context) = (Vec::new(), Context::new(&Stop::new()));
    while links.len() < usize::from(channels) {
        links.push(listener.accept(&context)?.ok_or("the listener was woken")?);
    }
    thread::scope(|scope| {
        let block = &block;
        let receivers: Vec<_> =
            links.into_iter().map(|link| scope.spawn(move || receive_from(link, block, contents))).collect();
        receivers.into_iter().try_for_each(|receiver| receiver.join().map_err(|_| "a receiver panicked")?)
    })?;
    Ok(Arc::new(RamBlocks::new(vec![block])?))
}

fn receive_from(mut link: Box<dyn Link>, block: &RamBlock, contents: Contents) -> Result<()> {
    let mut head = vec![0; head_len(PageSize::KIB_4)];
    loop {
        if !all(&mut *link, &mut [PartMut::from(&mut head[..])])? {
            return Ok(());
        }
        let number = head.first_chunk::<NUMBER>().ok_or("a head")?;
        let runs = runs(block, contents, u64::from_be_bytes(*number))?;
        let mut parts: Vec<_> = runs.into_iter().map(PartMut::from).collect();
        if !all(&mut *link, &mut parts)? {
            return Err("the stream ends within a packet".into());
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
