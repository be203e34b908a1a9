//! Hands armed memory to another process, over a unix socket.
//!
//! ```text
//! "guestram" ─ length of the rest (u32) ─ features, modes, calls (u64 each) ─ count (u32) ─ regions
//! region = block (u32), start, end, host page, page, pages (u64 each), kind (u8), length of the name (u8), name
//! ```
//!
//! Numbers are big-endian. The descriptor comes with the first byte. What is received is checked: the other process may be another
//! version of this library, or may be broken. It cannot do more harm than its own memory allows: only the kernel acts on the
//! addresses, and only where the other process has registered them.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

use crate::{BlockIndex, BlockName};

use super::{Armed, FaultError, Features, MemoryKind, Modes, Region, Userfault, features};

impl Armed {
    /// Sends the descriptor and the addresses of all regions to another process, which can then serve the faults. This value stays
    /// valid: both processes can serve them, and the memory stays armed when the other process ends.
    ///
    /// # Errors
    /// If the other process does not read within `limit`, or has closed the socket.
    pub fn hand_over(&self, socket: &UnixStream, limit: Duration) -> Result<(), FaultError> {
        let bytes = encode(self);
        let until = Instant::now() + limit;
        let descriptors = [self.as_fd()];
        let mut at = 0;
        while at < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if at == 0 {
                control.push(SendAncillaryMessage::ScmRights(&descriptors));
            }
            let rest = [IoSlice::new(bytes.get(at..).unwrap_or_default())];
            match sendmsg(socket, &rest, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => at += sent,
                Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, until)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
        Ok(())
    }

    /// Receives armed memory that another process has [handed over](Self::hand_over). The drop of the returned value leaves
    /// it armed.
    ///
    /// # Errors
    /// If it does not arrive within `limit`, or is not armed memory.
    pub fn receive(socket: &UnixStream, limit: Duration) -> Result<Self, FaultError> {
        let until = Instant::now() + limit;
        let mut descriptor = None;
        let mut head = [0; MAGIC.len() + 4];
        fill(socket, &mut head, &mut descriptor, until)?;
        let (magic, length) = head.split_at(MAGIC.len());
        let length = Cursor(length).u32().unwrap_or(0);
        if magic != MAGIC || length > MOST {
            return Err(refused("it sent something else"));
        }
        let mut rest = vec![0; usize::try_from(length).unwrap_or(0)];
        fill(socket, &mut rest, &mut descriptor, until)?;
        let descriptor = descriptor.ok_or_else(|| refused("no descriptor came with the message"))?;
        decode(Cursor(&rest), descriptor)
            .ok_or_else(|| refused("the message is damaged, or of another version"))
    }
}

fn encode(armed: &Armed) -> Vec<u8> {
    let mut rest = Vec::new();
    for number in [armed.features().bits(), armed.modes().bits(), armed.calls()] {
        rest.extend(number.to_be_bytes());
    }
    let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    rest.extend(small(armed.regions().len()));
    for region in armed.regions() {
        let Region { block, name, addresses, host_page, kind, page, pages } = region;
        rest.extend(small(block.0));
        for number in [addresses.start, addresses.end, *host_page, *page, *pages] {
            rest.extend(number.to_be_bytes());
        }
        rest.push(match kind {
            MemoryKind::Anonymous => 0,
            MemoryKind::Shared => 1,
            MemoryKind::Huge { private: false } => 2,
            MemoryKind::Huge { private: true } => 3,
        });
        // A name has at most 255 bytes.
        rest.push(u8::try_from(name.as_bytes().len()).unwrap_or(u8::MAX));
        rest.extend(name.as_bytes());
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(small(rest.len()));
    bytes.extend(rest);
    bytes
}

fn decode(mut from: Cursor<'_>, descriptor: OwnedFd) -> Option<Armed> {
    let (found, modes, calls) = (from.u64()?, Modes::of_bits(from.u64()?)?, from.u64()?);
    let features = Features::of_bits(found);
    // An event that is not known here could not be answered.
    if !features::ALL.contains(features) {
        return None;
    }
    let mut regions = Vec::new();
    for _ in 0..from.u32()? {
        regions.push(from.region()?);
    }
    let userfault = Userfault::handed_over(descriptor, features);
    from.0.is_empty().then(|| Armed::elsewhere(userfault, modes, calls, regions))
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    fn region(&mut self) -> Option<Region> {
        let block = BlockIndex(usize::try_from(self.u32()?).ok()?);
        let addresses = self.u64()?..self.u64()?;
        let (host_page, page, pages) = (self.u64()?, self.u64()?, self.u64()?);
        let kind = match self.u8()? {
            0 => MemoryKind::Anonymous,
            1 => MemoryKind::Shared,
            2 => MemoryKind::Huge { private: false },
            3 => MemoryKind::Huge { private: true },
            _ => return None,
        };
        let length = usize::from(self.u8()?);
        let name = BlockName::new(self.take(length)?)?;
        let len = addresses.end.checked_sub(addresses.start)?;
        let sizes = host_page.is_power_of_two() && page.is_power_of_two() && host_page <= MOST_HOST_PAGE;
        let fits = sizes
            && addresses.start.is_multiple_of(host_page)
            && len == pages.checked_mul(page)?.checked_next_multiple_of(host_page)?;
        (fits && pages > 0).then_some(Region { block, name, addresses, host_page, kind, page, pages })
    }
}

/// Fills `into`, and keeps the descriptor that comes with it.
fn fill(
    socket: &UnixStream,
    into: &mut [u8],
    descriptor: &mut Option<OwnedFd>,
    until: Instant,
) -> Result<(), FaultError> {
    let mut at = 0;
    while at < into.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut rest = [IoSliceMut::new(into.get_mut(at..).unwrap_or_default())];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(socket, &mut rest, &mut control, flags) {
            Ok(received) if received.bytes == 0 => return Err(refused("it closed the connection")),
            Ok(received) => at += received.bytes,
            Err(Errno::AGAIN) => wait(socket, PollFlags::IN, until)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                *descriptor = descriptors.next().or(descriptor.take());
            }
        }
    }
    Ok(())
}

fn wait(socket: &UnixStream, for_what: PollFlags, until: Instant) -> Result<(), FaultError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(failed(io::ErrorKind::TimedOut.into()));
    }
    let limit = Timespec::try_from(left).ok();
    match poll(&mut [PollFd::new(socket, for_what)], limit.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

fn failed(source: io::Error) -> FaultError {
    FaultError::System { what: "exchange armed memory with the other process", source }
}

fn refused(why: &str) -> FaultError {
    FaultError::NotHandedOver { why: why.to_owned() }
}

const MAGIC: &[u8; 8] = b"guestram";
/// The longest message that is accepted, in bytes: some ten thousand regions.
const MOST: u32 = 1 << 20;
/// The largest host page of any architecture is 16 GiB.
const MOST_HOST_PAGE: u64 = 16 << 30;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn what_is_no_armed_memory_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let refused = Armed::receive(&ours, Duration::from_millis(10)).expect_err("nothing");
        assert!(matches!(refused, FaultError::System { .. }), "{refused}");
        theirs.write_all(b"something else entirely").expect("sent");
        let refused = Armed::receive(&ours, LIMIT).expect_err("something else");
        assert!(refused.to_string().ends_with("it sent something else"), "{refused}");

        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(b"guestram\x00\x10\x00\x01").expect("sent");
        assert!(Armed::receive(&ours, LIMIT).is_err(), "too long by one");

        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(b"guestram\x00\x00\x00\x01\x00").expect("sent");
        let refused = Armed::receive(&ours, LIMIT).expect_err("no descriptor");
        assert!(refused.to_string().contains("no descriptor"), "{refused}");

        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(b"guestr").expect("sent");
        drop(theirs);
        let refused = Armed::receive(&ours, LIMIT).expect_err("a part");
        assert!(refused.to_string().ends_with("it closed the connection"), "{refused}");
    }

    fn descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("opened").into()
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_itself_and_a_shorter_message_is_refused(
            regions in vec((1_u64..1 << 40, 1_u64..1 << 20, 0_usize..3, "[a-z]{1,200}"), 0..5),
            modes in 1_u64..8,
            cut in any::<usize>(),
        ) {
            let regions = (0..).zip(&regions).map(|(index, (start, pages, kind, name))| {
                let (host_page, kind) = [
                    (4096, MemoryKind::Anonymous),
                    (4096, MemoryKind::Shared),
                    (2 << 20, MemoryKind::Huge { private: true }),
                ][*kind];
                let start = start * host_page;
                let addresses = start..start + (pages * 4096).next_multiple_of(host_page);
                let name = BlockName::new(name).expect("a name");
                Region { block: BlockIndex(index), name, addresses, host_page, kind, page: 4096, pages: *pages }
            });
            let regions: Vec<_> = regions.collect();
            let userfault = Userfault::handed_over(descriptor(), Features::POISON);
            let modes = Modes::of_bits(modes).expect("modes");
            let bytes = encode(&Armed::elsewhere(userfault, modes, 7, regions.clone()));
            let rest = &bytes[MAGIC.len() + 4..];
            let found = decode(Cursor(rest), descriptor()).expect("decoded");
            prop_assert_eq!(found.regions(), &regions[..]);
            prop_assert!(found.modes() == modes && found.features() == Features::POISON && found.calls() == 7);
            prop_assert!(decode(Cursor(&rest[..cut % rest.len()]), descriptor()).is_none());
        }

        #[test]
        fn no_message_causes_a_panic(bytes in vec(any::<u8>(), 0..300)) {
            let _ = decode(Cursor(&bytes), descriptor());
            let _ = Cursor(&bytes).region();
        }
    }

    #[test]
    fn a_region_that_cannot_be_one_is_refused() {
        let region = |start: u64, end: u64, host_page: u64, page: u64, pages: u64, kind: u8| {
            let mut bytes = 7_u32.to_be_bytes().to_vec();
            [start, end, host_page, page, pages].iter().for_each(|number| bytes.extend(number.to_be_bytes()));
            bytes.extend([kind, 1, b'b']);
            Cursor(&bytes).region()
        };
        let found = region(0x20_0000, 0x20_2000, 4096, 4096, 2, 1).expect("a region");
        assert_eq!((found.block, found.addresses, found.pages), (BlockIndex(7), 0x20_0000..0x20_2000, 2));
        for (start, end, host_page, page, pages, kind) in [
            (0x20_0000, 0x20_2000, 4096, 4096, 2, 4),
            (0x20_0001, 0x20_2001, 4096, 4096, 2, 1),
            (0x20_2000, 0x20_0000, 4096, 4096, 2, 1),
            (0x20_0000, 0x20_2000, 4096, 4096, 3, 1),
            (0x20_0000, 0x20_2000, 0, 4096, 2, 1),
            (0x20_0000, 0x20_2000, 4096, 0, 2, 1),
            (0x20_0000, 0x20_0000, 4096, 4096, 0, 1),
            (0x20_0000, 0x20_2000, 4096, 1 << 63, u64::MAX, 1),
        ] {
            assert!(region(start, end, host_page, page, pages, kind).is_none());
        }
    }
}
