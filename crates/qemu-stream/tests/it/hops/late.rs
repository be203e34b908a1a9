//! What the guide says about late cancels, owners that go away, and machines that change between two attempts.

use std::{
    io::{self, Read, Write},
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use multifd::{
    Error, ReceiveOptions,
    channel::{Stop, Wake},
    live::{MigrateOptions, Migration},
    ram::{Access, BlockName, Mapping, Memory, NeverDirty, PageSize, RamBlock, RamBlocks},
};
use qemu_stream::{
    Connection,
    arrival::{Arrival, ArrivalOptions, Pending},
    format::{Configuration, MachineType, Message},
    incoming::Expected,
    outgoing::{MainStream, Options, Outgoing},
    source::{Source, SourceOptions},
};

use super::kit::{
    RAM, Told, as_announced, block, blocks, departure, difference, fill, hop, listening, taken,
};

/// The destination has sent its confirmation, so the source must not take the guest back.
#[test]
fn a_cancel_after_the_destination_has_the_guest_changes_nothing() {
    for channels in [0, 2] {
        for _ in 0..10 {
            let source = blocks(&RAM);
            let (listener, address) = listening();
            let stop = Stop::new();
            let cancelled = stop.clone();
            let arriving = thread::spawn(move || {
                let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
                let arrival =
                    Arrival::listen(listener, ArrivalOptions::new(expected), &Stop::new())?.accept()?;
                let confirmed = arrival.load(as_announced)?.confirm()?;
                cancelled.cancel();
                confirmed.finish();
                Ok::<_, Error>(())
            });
            let mut guest = Told::default();
            let leaving = departure(&source, channels, MigrateOptions::new(), &stop);
            leaving.migrate(address, &mut NeverDirty, &mut guest).expect("the destination has the guest");
            arriving.join().expect("no panic").expect("taken");
            stop.cancel();
            assert_eq!((guest.stops, guest.resumes), (1, 0), "{channels} channels");
        }
    }
}

/// The guard belongs to the future, as where an async task waits for the migration in another thread.
#[test]
fn a_future_that_is_dropped_cancels_the_migration_that_it_waits_for() {
    let source = blocks(&RAM);
    let (listener, address) = listening();
    let arriving = thread::spawn(move || {
        let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
        let arrival = Arrival::listen(listener, ArrivalOptions::new(expected), &Stop::new())?.accept()?;
        arrival.load(as_announced).and_then(taken)
    });
    let stop = Stop::new();
    // It waits before the switchover until it is dropped.
    let leaving = departure(&source, 2, MigrateOptions::new().pause_before_switchover(true), &stop);
    let control = leaving.control();
    let migrating = thread::spawn(move || {
        let mut guest = Told::default();
        let left = leaving.migrate(address, &mut NeverDirty, &mut guest);
        (left, guest)
    });
    {
        let mut task = pin!(async {
            let _guard = stop.cancel_on_drop();
            std::future::pending::<()>().await;
        });
        assert_eq!(task.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending);
        assert!(control.wait_pre_switchover());
        assert!(!stop.is_stopped());
    }
    let (left, guest) = migrating.join().expect("no panic");
    assert!(left.expect_err("cancelled").is_cancelled());
    assert_eq!((guest.stops, guest.resumes), (1, 1));
    arriving.join().expect("no panic").expect_err("cancelled");
}

/// Regression: a time limit beyond the clock's range was a panic when everything had been sent, and the guest ran on both
/// sides.
#[test]
fn the_longest_time_limits_are_no_limits() {
    for channels in [0, 2] {
        let source = blocks(&RAM);
        let (listener, address) = listening();
        let arriving = thread::spawn(move || {
            let expected = Expected::Type(MachineType::new("told-1").expect("a name"));
            let receive =
                ReceiveOptions::new().greeting_timeout(Duration::MAX).channels_timeout(Duration::MAX);
            let options = ArrivalOptions::new(expected).receive(receive);
            let options = options.stall_timeout(Some(Duration::MAX)).silence(Duration::MAX);
            let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;
            let mut confirmed = arrival.load(as_announced)?.confirm()?;
            confirmed.wait_closed(Duration::MAX)?;
            confirmed.finish();
            Ok::<_, Error>(())
        });
        let migrate = MigrateOptions::new()
            .max_total_time(Some(Duration::MAX))
            .switchover_timeout(Some(Duration::MAX))
            .max_bandwidth(Some(u64::MAX))
            .avail_switchover_bandwidth(Some(u64::MAX))
            .max_passes(Some(u64::MAX));
        let configuration = Configuration::new(MachineType::new("told-1").expect("a name"));
        let options = SourceOptions::new(configuration)
            .channels(channels)
            .migrate(migrate)
            .connect_timeout(Duration::MAX)
            .stall_timeout(Some(Duration::MAX))
            .end_timeout(Some(Duration::MAX))
            .verdict_timeout(Duration::MAX);
        let mut guest = Told::default();
        let leaving = Source::new(source, options, &Stop::new()).expect("options");
        leaving.migrate(address, &mut NeverDirty, &mut guest).expect("left");
        arriving.join().expect("no panic").expect("arrived");
        assert_eq!((guest.stops, guest.resumes), (1, 0), "{channels} channels");
    }
}

/// A connection of the embedder's that panics when it is read after these bytes.
struct Panics(io::Cursor<Vec<u8>>);

impl Read for Panics {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.0.read(into)? {
            // Without the message of the panic in the output of the test.
            0 => std::panic::resume_unwind(Box::new("as told")),
            read => Ok(read),
        }
    }
}

impl Write for Panics {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection for Panics {
    fn set_read_timeout(&mut self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
    fn write_waker(&self) -> Option<Arc<dyn Wake>> {
        None
    }
}

/// Regression: after such a panic the guest was resumed, although the destination could have it.
#[test]
fn a_panic_while_the_destination_is_asked_leaves_the_owner_unknown() {
    let mut ready = Vec::new();
    Message::Pong(0x6d66_6601).encode(&mut ready);
    for (has_ram, resumes) in [(false, false), (true, false), (true, true)] {
        let (stop, mut guest) = (Stop::new(), Told::default());
        let replies = if has_ram { ready.clone() } else { Vec::new() };
        let configuration = Configuration::new(MachineType::new("told-1").expect("a name"));
        let stream = Options::new(configuration).sync_mode(None);
        let outgoing = Outgoing::new(Panics(io::Cursor::new(replies)), stream).expect("options");
        let mut main = MainStream::of_guest(outgoing, &stop);
        let options = MigrateOptions::new().resume_if_unknown(resumes);
        let migration = Migration::over_main(options, blocks(&RAM), stop).expect("options");
        let error = migration.run(&mut main, &mut NeverDirty, &mut guest).expect_err("it panics");
        assert_eq!(matches!(error, Error::OwnerUnknown(_)), has_ram, "{error:?}");
        assert_eq!((guest.stops, guest.resumes), (1, u32::from(!has_ram || resumes)));
    }
}

/// The blocks belong to one attempt. The next one has the blocks of the machine as it is then.
#[test]
fn memory_that_is_plugged_between_two_attempts_moves_with_the_second() {
    let file = tempfile::tempfile().expect("a file");
    let bytes = 64 << 12;
    file.set_len(bytes).expect("a length");
    let ram = || {
        let mapping = Mapping::of_file(&file, 0, bytes, Access::ReadWrite).expect("mapped");
        let name = BlockName::new("ram").expect("a name");
        RamBlock::new(name, bytes, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block")
    };
    let before = Arc::new(RamBlocks::new(vec![ram()]).expect("one"));
    fill(&before);
    let mut guest = Told::default();
    let refuse = |pending: Pending| Err::<(), _>(pending.refuse(Error::text("not yet")));
    let options = MigrateOptions::new;
    let (left, _) = hop(&before, 2, options(), &mut NeverDirty, &mut guest, as_announced, refuse);
    left.expect_err("refused");
    drop(before);

    let plugged = block("plugged", 16);
    let after = Arc::new(RamBlocks::new(vec![ram(), plugged]).expect("distinct"));
    fill(&after);
    let (left, arrived) = hop(&after, 2, options(), &mut NeverDirty, &mut guest, as_announced, taken);
    left.expect("left");
    let (arrived, _) = arrived.expect("arrived");
    assert_eq!((arrived.len(), difference(&after, &arrived)), (2, None));
    assert_eq!((guest.stops, guest.resumes), (2, 1));
}
