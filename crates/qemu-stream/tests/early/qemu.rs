//! A stock QEMU as the source of a machine whose RAM follows. Threads that read its memory stand in for its guest.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use multifd::{
    channel::{Listener, Stop},
    ram::{Mapping, Memory, PageIndex, RamBlock, RamBlocks},
};
use multifd_testkit::{
    guest::Guest,
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Finished, Landing, Running},
    incoming::Expected,
};
use serde_json::json;

use crate::{LIMIT, may_run};

const MEMORY: u64 = 40 << 20;
/// Of which a processor sees other memory.
const NOT_RAM: std::ops::Range<u64> = 0xa0..0x100;

/// Passes the connections of a source on, counts what they carry, and cuts them.
#[derive(Clone)]
struct Relay {
    address: String,
    connections: Arc<Mutex<Vec<Arc<Passed>>>>,
}

struct Passed {
    sockets: [TcpStream; 2],
    bytes: AtomicU64,
}

impl Relay {
    fn new(to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = format!("tcp:{}", listener.local_addr().expect("an address"));
        let this = Self { address, connections: Arc::default() };
        let relay = this.clone();
        // It ends with the process.
        thread::spawn(move || {
            for from in listener.incoming() {
                let (Ok(from), Ok(to)) = (from, TcpStream::connect(&to)) else { return };
                relay.passes([from, to]);
            }
        });
        this
    }

    fn passes(&self, sockets: [TcpStream; 2]) {
        let passed = Arc::new(Passed { sockets, bytes: AtomicU64::new(0) });
        self.connections.lock().expect("whole").push(passed.clone());
        let back = passed.clone();
        thread::spawn(move || copy(&passed.sockets[0], &passed.sockets[1], &passed.bytes));
        thread::spawn(move || copy(&back.sockets[1], &back.sockets[0], &AtomicU64::new(0)));
    }

    /// What each connection has carried from the source so far.
    fn carried(&self) -> Vec<u64> {
        let connections = self.connections.lock().expect("whole");
        connections.iter().map(|passed| passed.bytes.load(Ordering::SeqCst)).collect()
    }

    fn cut(&self, which: usize) {
        for socket in &self.connections.lock().expect("whole")[which].sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, bytes: &AtomicU64) {
    let mut buffer = vec![0; 16 << 10];
    let mut copied = || -> io::Result<bool> {
        let got = from.read(&mut buffer)?;
        to.write_all(&buffer[..got])?;
        bytes.fetch_add(got as u64, Ordering::SeqCst);
        Ok(got > 0)
    };
    let ended = loop {
        match copied() {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    let _ = to.shutdown(Shutdown::Write);
    // As the system does it: what is sent to a side that is gone is answered by a reset.
    if ended.is_err() {
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    }
}

/// Waits for a machine, and takes it over.
fn confirmed(listener: Listener) -> multifd::Result<Running> {
    let options = ArrivalOptions::new(Expected::AnyMachine).run_early(true);
    let options = options.pause_timeout(Some(LIMIT));
    let announced = Arrival::listen(listener, options, &Stop::new())?.accept()?.announced()?;
    let list = announced.list();
    let blocks = list.entries().iter().map(|entry| {
        let memory = Memory::Mapped(Mapping::anonymous(entry.used_length).expect("memory"));
        RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), memory).expect("a block")
    });
    let blocks = RamBlocks::new(blocks.collect()).expect("distinct");
    let early = match announced.load_early(blocks, EarlyOptions::new())? {
        Landing::Early(early) => early,
        Landing::Complete(_) => panic!("the source did not switch"),
    };
    early.confirm()
}

/// Takes a machine over, and reads all of its memory in an order that is not that of the source.
fn land(listener: Listener) -> multifd::Result<(Arc<RamBlocks>, Finished)> {
    let mut running = confirmed(listener)?;
    let blocks = running.blocks().clone();
    let reads = (1..=2).map(|seed| {
        let blocks = blocks.clone();
        thread::spawn(move || {
            let ram = blocks.find(b"pc.ram").and_then(|index| blocks.get(index)).expect("there");
            let mut pages: Vec<u64> = (0..ram.pages()).collect();
            fastrand::Rng::with_seed(seed).shuffle(&mut pages);
            let mut bytes = [0; 4096];
            for page in pages {
                ram.slice(PageIndex(page), 1).expect("mapped").copy_to(&mut bytes);
                // So that requests come for some seconds.
                thread::sleep(Duration::from_micros(300));
            }
        })
    });
    let reads: Vec<_> = reads.collect();
    assert!(running.wait(Some(LIMIT)), "{running:?}");
    let finished = running.finish()?;
    reads.into_iter().for_each(|read| read.join().expect("no panic"));
    Ok((blocks, finished))
}

/// A QEMU whose guest outwrites the line, and needs seconds for the rest of its RAM after the switch.
fn busy(qemu: &Qemu, preempt: bool) -> Result<Vm, Error> {
    let guest = Guest::new().working_set(512).filled(2048).filled_checked(256);
    let mut from = qemu.vm().machine(&qemu.machine()).memory(MEMORY).guest(&guest).start()?;
    from.wait_round(2, PATIENCE)?;
    from.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)])?;
    let slow =
        json!({ "max-bandwidth": 20_000_000, "downtime-limit": 20, "max-postcopy-bandwidth": 300_000 });
    from.set_parameters(slow)?;
    Ok(from)
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Moves a guest, with these cuts of the newest connections: main is 0, that of preempt 1.
fn moves(qemu: &Qemu, preempt: bool, cuts: &[usize]) -> Result<(), Error> {
    let mut from = busy(qemu, preempt)?;
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let relay = Relay::new(listener.local_address().to_string().trim_start_matches("tcp:").to_owned());
    let arriving = thread::spawn(move || land(listener));
    from.migrate(&relay.address)?;
    from.wait_passes(2, PATIENCE)?;
    from.execute("migrate-start-postcopy", json!({}))?;
    let connections = 1 + usize::from(preempt);
    for (round, cut) in cuts.iter().enumerate() {
        let newest = round * connections;
        // QEMU 7.2 takes its guest back if the connection breaks earlier.
        wait_until("pages after the switch", || {
            let sent = from.query_migrate().map(|told| told["ram"]["postcopy-bytes"].as_u64());
            sent.expect("an answer") > Some(0)
                && (!preempt || relay.carried().get(newest + 1) > Some(&20_000))
        });
        relay.cut(newest + cut);
        from.wait_migration("postcopy-paused", PATIENCE)?;
        from.execute("migrate", json!({ "uri": relay.address, "resume": true }))?;
    }
    if !cuts.is_empty() {
        from.set_parameters(json!({ "max-postcopy-bandwidth": 0 }))?;
    }
    from.wait_migration("completed", PATIENCE)?;
    let (blocks, finished) = arriving.join().expect("no panic").expect("arrived");
    let carried = relay.carried();
    println!("QEMU {}, preempt {preempt}, cuts {cuts:?}: {carried:?}, {:?}", qemu.series(), finished.faults);
    assert!(finished.faults.faults > 0 && finished.faults.missing == 0, "{:?}", finished.faults);
    assert_eq!(carried.len(), connections * (1 + cuts.len()));
    let before = from.pmemsave(0, MEMORY)?;
    let ram = blocks.find(b"pc.ram").and_then(|index| blocks.get(index)).expect("there");
    let mut bytes = [0; 4096];
    for (page, expected) in (0..).zip(before.chunks(4096)).filter(|(page, _)| !NOT_RAM.contains(page)) {
        ram.slice(PageIndex(page), 1).expect("mapped").copy_to(&mut bytes);
        assert!(bytes == expected, "page {page} differs");
    }
    Ok(())
}

fn with_both(test: impl Fn(&Qemu) -> Result<(), Error>) {
    if !may_run() {
        return;
    }
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        test(&qemu).unwrap_or_else(|error| panic!("QEMU {}: {error}", qemu.series()));
    }
}

#[test]
fn guest_of_a_stock_qemu_arrives_before_its_ram() {
    with_both(|qemu| moves(qemu, false, &[]));
}

#[test]
fn requested_pages_of_a_stock_qemu_come_over_their_own_connection() {
    with_both(|qemu| moves(qemu, true, &[]));
}

#[test]
fn stock_qemu_returns_after_any_of_its_connections_has_broken() {
    with_both(|qemu| moves(qemu, false, &[0]));
    with_both(|qemu| moves(qemu, true, &[1, 0, 1]));
}

/// Regression: it was told that its destination had failed. QEMU 10.0 then takes its guest back, which has run at the destination.
#[test]
fn stock_qemu_does_not_take_a_guest_back_that_has_run_at_its_destination() {
    with_both(|qemu| {
        for preempt in [false, true] {
            let mut from = busy(qemu, preempt)?;
            let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
            let address = listener.local_address().to_string();
            let taken = thread::spawn(move || confirmed(listener).map(drop));
            from.migrate(&address)?;
            from.wait_passes(2, PATIENCE)?;
            from.execute("migrate-start-postcopy", json!({}))?;
            taken.join().expect("no panic").expect("taken over");
            from.wait_migration("postcopy-paused", PATIENCE)?;
            assert_ne!(from.run_state()?, "running");
        }
        Ok(())
    });
}
