//! Memory that another process hands over: the packet before a migration, and armed memory for a pager. Over a unix socket, with
//! descriptors.
//!
//! The first byte chooses: its lowest bit who receives, the next three how many descriptors come, the next one whether they are
//! files, the last three how long these are in MiB. The second byte is the length of the first piece, which has the descriptors.
//! What a source of this project would send for the memory that was received must be received as the same memory.
#![no_main]

use std::{
    fs::File,
    io::{IoSlice, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{Mutex, OnceLock},
    time::Duration,
};

use multifd::{
    channel::{
        Address, Connect, Context, Listen, Stop,
        hand_over::{HandOver, HandOverListener, HandedOver, SharedMemory},
    },
    ram::{Access, Armed, BlockOffset, Mapping, Memory, PageSize, Protection, RamBlock, RamBlocks},
};
use multifd_fuzz::shown;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

const LIMIT: Duration = Duration::from_millis(50);

multifd_fuzz::target!(|bytes: &[u8]| {
    let [choice, first, packet @ ..] = bytes else { return };
    let files = descriptors(*choice);
    let (head, tail) = packet.split_at(packet.len().min(usize::from(*first).max(1)));
    let send = |socket: UnixStream| {
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        if with_descriptors(&socket, head, &descriptors) {
            let _ = (&socket).write_all(tail);
        }
        drop(socket);
    };
    if choice & 1 == 0 { memory(send) } else { armed(send) }
});

/// The packet before a migration.
fn memory(send: impl FnOnce(UnixStream)) {
    let received = received(|path| {
        send(UnixStream::connect(path).expect("it listens"));
    });
    // A machine has whole pages. Blocks that do not fit into it are refused later, by name; here each is one of its own.
    let fits =
        |one: &SharedMemory| one.length > 0 && one.length.is_multiple_of(4096) && one.length <= 8 << 20;
    let Some(received) = received.filter(|all| all.iter().all(fits)) else { return };
    let Some(blocks) = blocks(&received) else { return };
    let shape = |memory: &[SharedMemory]| -> Vec<_> {
        memory.iter().map(|one| (one.block.clone(), one.offset, one.length)).collect()
    };
    let before = shape(&received);
    let again = self::received(|path| {
        let address = Address::Unix(path.to_owned());
        let connector = HandOver::new(&address, &blocks, received).expect("it is mapped from there");
        drop(connector.connect(&Context::new(&Stop::new())).expect("it listens"));
    });
    assert_eq!(again.map(|again| shape(&again)), Some(before));
}

/// What arrives if `connect` connects and closes.
fn received(connect: impl FnOnce(&PathBuf)) -> Option<Vec<SharedMemory>> {
    type Place = (PathBuf, Mutex<(HandOverListener, HandedOver)>);
    static PLACE: OnceLock<Place> = OnceLock::new();
    let (path, listening) = PLACE.get_or_init(|| {
        let path = tempfile::tempdir().expect("a folder").keep().join("socket");
        let bound = HandOverListener::bind(&Address::Unix(path.clone())).expect("listens");
        (path, Mutex::new(bound))
    });
    let mut listening = listening.lock().expect("whole");
    let (listener, handed) = &mut *listening;
    connect(path);
    let mut link = listener.accept(&Context::new(&Stop::new())).expect("a connection")?;
    link.set_recv_timeout(Some(LIMIT)).expect("a limit");
    let mut buffer = [0; 4096];
    loop {
        match link.recv(&mut [(&mut buffer[..]).into()]) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                shown::<(), _>(Err(error));
                break;
            }
        }
    }
    shown(handed.take())
}

/// The machine whose memory this is; `None` if it cannot be mapped.
fn blocks(received: &[SharedMemory]) -> Option<RamBlocks> {
    let block = |one: &SharedMemory| {
        let mapping = Mapping::of_file(&one.file, one.offset, one.length, Access::ReadWrite).ok()?;
        let memory = Memory::Mapped(mapping);
        Some(RamBlock::new(one.block.clone(), one.length, PageSize::KIB_4, memory).ok()?.ignored())
    };
    RamBlocks::new(received.iter().map(block).collect::<Option<Vec<_>>>()?)
        .ok()
        .filter(|_| !received.is_empty())
}

/// Armed memory for a pager.
fn armed(send: impl FnOnce(UnixStream)) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    send(theirs);
    let Some(armed) = shown(Armed::receive(&ours, LIMIT)) else { return };
    let mut events = Vec::new();
    shown(armed.read_events(&mut events));
    for region in armed.regions() {
        assert!(region.addresses.start < region.addresses.end && region.shape().pages > 0);
        let page = vec![0; usize::try_from(region.host_page.min(1 << 21)).expect("small")];
        // The descriptor is none of a userfaultfd.
        assert!(armed.copy(region.block, BlockOffset(0), &page, Protection::Writable).is_err());
        shown(armed.wake(region.block, BlockOffset(0), region.host_page));
    }
    let (here, there) = UnixStream::pair().expect("a pair");
    // A packet that is longer than the socket's buffer has no reader.
    if armed.hand_over(&here, LIMIT).is_ok() {
        let again = shown(Armed::receive(&there, LIMIT)).expect("what was received can be sent");
        assert_eq!((again.regions(), again.features()), (armed.regions(), armed.features()));
    }
}

fn descriptors(choice: u8) -> Vec<OwnedFd> {
    let count = choice >> 1 & 7;
    let is_file = choice >> 4 & 1 == 0;
    let length = u64::from(choice >> 5) << 20;
    (0..count)
        .map(|_| {
            if is_file {
                let file: File = multifd_fuzz::file();
                file.set_len(length).expect("sized");
                file.into()
            } else {
                UnixStream::pair().expect("a pair").0.into()
            }
        })
        .collect()
}

/// Sends bytes with descriptors. Returns whether all of them were sent.
fn with_descriptors(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
    let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(descriptors).size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).is_ok_and(|sent| sent == bytes.len())
}
