//! The connection for requested pages (postcopy-preempt) ends, and a page that was on it is lost. The source has sent everything, and
//! may have noticed nothing.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread::{self, JoinHandle},
    time::Duration,
};

use multifd::{
    Error, ReceiveOptions,
    channel::{Listener, Stop},
    error::chain,
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Finished, Landing},
    format::{Command, Section, encode_footer},
    incoming::Expected,
};

use crate::{
    LIMIT,
    hostile::{begin, clock, part, zero},
    machine::{BLOCKS, memory},
    may_run,
    switch::{RAM, command, name, package},
};

/// When the connection for requested pages ends, and what it has carried.
#[derive(Clone, Copy, Debug)]
enum Ends {
    BeforeTheSwitch,
    Silent,
    WithinARecord,
    /// After another page, which is there already.
    AfterAPage,
    /// As QEMU 7.2 ends it when all requests were answered.
    WithEos,
}

const EOS: [u8; 8] = 0x10_u64.to_be_bytes();
/// The page that is lost.
const LOST: u64 = 7 << 12;

fn end() -> Vec<u8> {
    let mut bytes = Vec::new();
    Section::End(RAM).encode(&mut bytes);
    bytes.extend(EOS);
    encode_footer(RAM, &mut bytes);
    bytes.push(0);
    bytes
}

/// All pages but one.
fn others() -> Vec<u8> {
    let pages = BLOCKS.iter().flat_map(|(block, pages)| (0..*pages).map(move |page| (block, page << 12)));
    let pages = pages.filter(|(block, at)| (**block, *at) != ("ram", LOST));
    pages.flat_map(|(block, at)| part(&zero(block, at))).collect()
}

fn land(listener: Listener) -> JoinHandle<Result<Finished, Error>> {
    thread::spawn(move || {
        let receive =
            ReceiveOptions::new().accept_timeout(Some(LIMIT)).greeting_timeout(Duration::from_millis(50));
        let options = ArrivalOptions::new(Expected::AnyMachine).receive(receive).run_early(true);
        let options = options.pause_timeout(Some(LIMIT));
        let announced = Arrival::listen(listener, options, &Stop::new())?.accept()?.announced()?;
        let Landing::Early(early) = announced.load_early(memory(), EarlyOptions::new())? else {
            panic!("it has switched")
        };
        let mut running = early.confirm()?;
        assert!(running.wait(Some(LIMIT)), "{running:?}");
        running.finish()
    })
}

/// Reads replies until these have come.
fn read_up_to(main: &mut TcpStream, last: &[u8]) -> Option<()> {
    let (mut read, mut byte) = (Vec::new(), [0]);
    while !read.ends_with(last) {
        main.read_exact(&mut byte).ok()?;
        read.extend(byte);
    }
    Some(())
}

/// What comes until the destination closes the connection.
fn rest(main: &mut TcpStream) -> Vec<u8> {
    let mut read = Vec::new();
    // A reset loses nothing that was read.
    let _ = main.read_to_end(&mut read);
    read
}

fn pong(value: u8) -> [u8; 8] {
    [0, 2, 0, 4, 0, 0, 0, value]
}

fn shut(value: u8) -> [u8; 8] {
    [0, 1, 0, 4, 0, 0, 0, value]
}

/// A source whose second connection ends so. Returns whether the destination has waited for its return.
fn send(address: &str, ends: Ends) -> Option<()> {
    let connect = || TcpStream::connect(address).expect("connected");
    let mut main = connect();
    main.set_read_timeout(Some(LIMIT)).expect("set");
    main.write_all(&begin()).expect("sent");
    main.write_all(&command(Command::Ping(2))).expect("sent");
    read_up_to(&mut main, &pong(2)).expect("PONG 2");
    let mut preempt = connect();
    if let Ends::BeforeTheSwitch = ends {
        preempt.shutdown(Shutdown::Write).expect("closed");
    }
    main.write_all(&package(&clock())).expect("sent");
    // The destination may break the connections off before it has the guest.
    if read_up_to(&mut main, &pong(3)).is_some() {
        match ends {
            Ends::BeforeTheSwitch | Ends::Silent => {}
            Ends::WithinARecord => preempt.write_all(&zero("ram", LOST)[..9]).expect("sent"),
            Ends::AfterAPage => preempt.write_all(&zero("ram", 0)).expect("sent"),
            Ends::WithEos => preempt.write_all(&EOS).expect("sent"),
        }
        let _ = preempt.shutdown(Shutdown::Write);
        let _ = main.write_all(&others()).and_then(|()| main.write_all(&end()));
        let replies = rest(&mut main);
        // QEMU takes its guest back if it learns of a failure, and the guest runs at the destination.
        assert!(!replies.windows(8).any(|message| message == shut(1)), "{ends:?}: {replies:x?}");
        if let Ends::WithEos = ends {
            return None;
        }
    }
    let mut again = connect();
    again.set_read_timeout(Some(LIMIT)).expect("set");
    for block in BLOCKS {
        again.write_all(&command(Command::RecvBitmap(name(block.0)))).expect("sent");
    }
    again.write_all(&command(Command::PostcopyResume)).expect("sent");
    // RESUME_ACK.
    read_up_to(&mut again, &[0, 6, 0, 4, 0, 0, 0, 1]).expect("RESUME_ACK");
    again.write_all(&part(&zero("ram", LOST))).expect("sent");
    again.write_all(&others()).expect("sent");
    again.write_all(&end()).expect("sent");
    read_up_to(&mut again, &shut(0))
}

/// Regression: a destination whose guest ran took the end of this connection for that of its pages. At the end of main it failed, and
/// its guest never got the page.
#[test]
fn a_page_that_is_lost_with_its_connection_comes_again_when_the_source_returns() {
    if !may_run() {
        return;
    }
    for ends in [Ends::BeforeTheSwitch, Ends::Silent, Ends::WithinARecord, Ends::AfterAPage] {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
        let address = listener.local_address().to_string().trim_start_matches("tcp:").to_owned();
        let landing = land(listener);
        let sent = send(&address, ends);
        let landed = landing.join().expect("no panic");
        let finished = landed.unwrap_or_else(|error| panic!("{ends:?}: {}", chain(&error)));
        assert_eq!((sent, finished.faults.missing), (Some(()), 0), "{ends:?}");
    }
}

#[test]
fn a_page_that_is_missing_when_its_connection_has_ended_in_order_is_an_error() {
    if !may_run() {
        return;
    }
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let address = listener.local_address().to_string().trim_start_matches("tcp:").to_owned();
    let landing = land(listener);
    assert_eq!(send(&address, Ends::WithEos), None);
    let error = landing.join().expect("no panic").expect_err("a page is missing");
    let error = chain(&error).to_string();
    assert!(error.contains("1 page of RAM did not arrive"), "{error}");
}
