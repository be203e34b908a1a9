//! A QEMU that takes its guest back at the last moment: nothing may report, or act as if, the guest were elsewhere too.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{channel::Stop, live::Verdict, ram::PageIndex};
use multifd_testkit::qemu::{Error, PATIENCE, Qemu};
use qemu_stream::{
    mapped_ram::{MappedRamFile, ReadPath},
    outgoing::{Options, Outgoing},
};
use serde_json::json;

use crate::kit::{
    Program, assert_left, fast, first_difference, folder, machine, memory, migrate, path, runs_on, source,
};

/// A relay to `target` that delays the last bytes of the first connection until its source closes it. Returns its
/// address, and the number of bytes of main that have arrived.
fn holding_back(target: &str) -> (String, Arc<AtomicU64>) {
    let target = target.strip_prefix("tcp:").expect("TCP").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("tcp:{}", listener.local_addr().expect("bound"));
    let came = Arc::new(AtomicU64::new(0));
    let main = came.clone();
    // Ends with its listener, which lives as long as the process.
    thread::spawn(move || {
        for (number, near) in listener.incoming().flatten().enumerate() {
            let Ok(far) = TcpStream::connect(&target) else { return };
            let back = (far.try_clone().expect("one more"), near.try_clone().expect("one more"));
            let (held, count) = if number == 0 { (HELD, Some(main.clone())) } else { (0, None) };
            thread::spawn(move || carry(&near, &far, held, count.as_deref()));
            thread::spawn(move || carry(&back.0, &back.1, 0, None));
        }
    });
    (address, came)
}

/// Copies; the last `held` bytes are sent after `from` has closed.
fn carry(mut from: &TcpStream, mut to: &TcpStream, held: usize, came: Option<&AtomicU64>) {
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    while let Ok(some @ 1..) = from.read(&mut buffer) {
        if let Some(came) = came {
            came.fetch_add(some as u64, Ordering::SeqCst);
        }
        bytes.extend(&buffer[..some]);
        let ready = bytes.len().saturating_sub(held);
        if to.write_all(&bytes[..ready]).is_err() {
            break;
        }
        bytes.drain(..ready);
    }
    let _ = to.write_all(&bytes);
    let _ = to.shutdown(Shutdown::Write);
}

/// Waits until the guest has stopped and nothing more arrives over main.
fn wait_until_all_is_sent(came: &AtomicU64) {
    let end = Instant::now() + PATIENCE;
    let mut last = (0, Instant::now());
    while last.0 == 0 || last.1.elapsed() < QUIET {
        assert!(Instant::now() < end, "the source goes on sending");
        thread::sleep(QUIET / 20);
        let now = came.load(Ordering::SeqCst);
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
}

/// The stream is complete, and the source has closed before it could be informed: it has its guest.
fn cancelled_when_all_is_sent(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(2)?;
    fast(&mut from)?;
    let (receive, address) = Program::receive(&["--json"], "tcp:127.0.0.1:0", &file);
    let (relay, came) = holding_back(&address);
    from.migrate(&relay)?;
    from.wait_run_state("finish-migrate", PATIENCE)?;
    wait_until_all_is_sent(&came);
    assert_eq!(from.run_state()?, "finish-migrate");
    from.cancel_migration(PATIENCE)?;
    from.wait_run_state("running", PATIENCE)?;
    let round = from.round()?.expect("the guest reports");
    from.wait_round(round + 1, PATIENCE)?;

    let ended = receive.end();
    ended.assert_failed(3, &["the source did not get the confirmation", "must not run twice"]);
    assert_eq!(ended.json()["source-told"], json!(false), "{ended:?}");
    // The file is complete, and `inspect` shows that.
    assert_left(&folder, &["machine"]);
    assert!(fs::metadata(&file).is_ok_and(|kept| kept.len() > 0));
    Ok(())
}

#[test]
fn qemu_7_2_takes_its_guest_back_when_all_is_sent() {
    let Some(qemu) = Qemu::v7_2() else { return };
    cancelled_when_all_is_sent(&qemu).unwrap();
}

#[test]
fn qemu_10_0_takes_its_guest_back_when_all_is_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    cancelled_when_all_is_sent(&qemu).unwrap();
}

/// Less than the description of the devices, which is last and only read when the stream has ended.
const HELD: usize = 64;
/// The time between two messages of a stopped source.
const QUIET: Duration = Duration::from_millis(500);

/// Before it sends its devices, a source of this library asks whether the destination has all of RAM: with a PING that
/// no QEMU sends, between the last pass and the end of RAM. QEMU answers it when it has read everything before it, and
/// continues.
fn answers_in_between(qemu: &Qemu) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.stop()?;
    let before = memory(&mut from)?;
    from.set_capabilities(&[("return-path", true)])?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    migrate(&mut from, &address)?;
    receive.done();

    let mut to = machine(qemu, &qemu.machine()).incoming().start()?;
    to.set_capabilities(&[("return-path", true)])?;
    let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
    let host = address.strip_prefix("tcp:").unwrap_or(&address);
    let file = MappedRamFile::open(File::open(&file).unwrap(), 0).unwrap();
    let options = Options::new(file.configuration().expect("a machine type").clone())
        .section(file.section())
        .footers(file.devices().has_footers())
        .switchover_start(file.switchover_start())
        .sync_mode(None);
    let mut out = Outgoing::new(TcpStream::connect(host).unwrap(), options).unwrap();
    out.begin(0).unwrap();
    out.setup(file.blocks().clone(), None).unwrap();
    out.early(file.devices()).unwrap();
    out.begin_part().unwrap();
    let blocks = file.ram_blocks(|_, _| ReadPath::Cached).unwrap();
    let mut page = vec![0; file.blocks().page_size().bytes()];
    for (index, block) in blocks.iter() {
        for at in (0..block.pages()).map(PageIndex).filter(|at| block.is_present(*at)) {
            block.load(at, &mut page).unwrap();
            out.page(index, at, &page).unwrap();
        }
    }
    out.end_part(None).unwrap();
    out.switchover().unwrap();
    out.ready().expect("an answer");
    out.begin_end().unwrap();
    out.end_part(None).unwrap();
    out.devices(file.devices()).unwrap();
    let verdict = out.complete(&Stop::new(), Some(PATIENCE), PATIENCE);
    assert!(matches!(verdict, Verdict::Taken), "{verdict:?}");
    to.wait_migration("completed", PATIENCE)?;
    assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
    to.cont()?;
    runs_on(&from, &mut to)
}

#[test]
fn qemu_7_2_answers_whether_it_has_all_of_ram() {
    let Some(qemu) = Qemu::v7_2() else { return };
    answers_in_between(&qemu).unwrap();
}

#[test]
fn qemu_10_0_answers_whether_it_has_all_of_ram() {
    let Some(qemu) = Qemu::v10_0() else { return };
    answers_in_between(&qemu).unwrap();
}
