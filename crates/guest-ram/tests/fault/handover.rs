//! Faults that another process serves.

use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command, Stdio},
};

use guest_ram::{Armed, BlockOffset, FaultEvent, Features, PageIndex, Protection};

use crate::kit::{self, BLOCK, LIMIT, pattern};

/// Starts another process of this program that runs a function, with a socket as its standard input.
pub(crate) fn start(test: &str) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let program = std::env::current_exe().expect("this test");
    let mut command = Command::new(program);
    command.args(["--ignored", "--exact", test, "--nocapture"]).env(OTHER, "1");
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    (command.spawn().expect("started"), ours)
}

/// The socket of the process that [`start`] has started; `None` in any other.
pub(crate) fn socket() -> Option<UnixStream> {
    std::env::var_os(OTHER)?;
    let input = rustix::io::dup(std::io::stdin()).expect("a descriptor");
    Some(UnixStream::from(input))
}

const OTHER: &str = "GUEST_RAM_TEST_OTHER";

#[test]
fn another_process_serves_the_faults_and_hands_the_memory_back() {
    let Some(userfault) = kit::open(Features::POISON) else { return };
    let blocks = kit::anonymous(8);
    let armed = Armed::arm_empty(userfault, blocks.clone()).expect("armed");
    let (mut pager, mut socket) = start("handover::pager");
    armed.hand_over(&socket, LIMIT).expect("handed over");
    for page in [5, 0, 7] {
        assert_eq!(kit::reader(&blocks, page).result(), [pattern(page); 4096]);
    }
    // The same memory, by a descriptor that has been in both processes.
    socket.write_all(b"b").expect("sent");
    let back = Armed::receive(&socket, LIMIT).expect("handed back");
    assert_eq!(back.regions(), armed.regions());
    assert!(back.features() == armed.features() && armed.is_own() && !back.is_own());
    let reader = kit::reader(&blocks, 1);
    assert_eq!(kit::events(&back).len(), 1);
    back.zero(BLOCK, BlockOffset(4096), 4096).expect("placed");
    assert_eq!(reader.result(), [0; 4096]);
    // It serves no memory of its own, so its drop does not end anything.
    drop(back);
    assert!(pager.wait().expect("ended").success());
    let reader = kit::reader(&blocks, 2);
    assert_eq!(kit::events(&armed).len(), 1);
    drop(armed);
    reader.result();
}

/// Not a separate test: the test above starts it.
#[test]
#[ignore = "the other process of a test"]
fn pager() {
    let Some(mut socket) = socket() else { return };
    let armed = Armed::receive(&socket, LIMIT).expect("handed over");
    let mut served = 0;
    while served < 3 {
        for event in kit::events(&armed) {
            let FaultEvent::Fault { block, offset, .. } = event else { panic!("{event:?}") };
            let page = PageIndex(offset.0 >> 12);
            armed.copy(block, offset, &[pattern(page.0); 4096], Protection::Writable).expect("placed");
            served += 1;
        }
    }
    socket.read_exact(&mut [0]).expect("the request");
    armed.hand_over(&socket, LIMIT).expect("handed back");
}
