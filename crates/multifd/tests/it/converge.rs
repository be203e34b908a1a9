//! Guests that write too fast: throttled, reported, given up; and migrations that pause before the switchover.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use multifd::{
    SendOptions, Sender,
    channel::{Stop, memory},
    error::{Error, Usage},
    live::{
        Bound, Control, DeviceInfo, DeviceSection, Guest, MigrateOptions, Migration, MigrationInfo, Percent,
        Progress, Remedy, RunState, Status,
    },
    ram::{BlockIndex, DirtyLog, DirtyPages, NeverDirty, PageBitmap, PageIndex, PageSize, RamBlocks},
};

use crate::kit::{StoppedGuest, TestMain, difference, fresh, receive, spawn, write};

const RAM: &[(&str, u64)] = &[("pc.ram", 1 << 20)];
const PAGES: u64 = 256;

/// A guest that writes to all of its pages between two bitmap syncs, unless it is throttled or stopped; and its log.
#[derive(Clone, Default)]
struct Busy(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// From this share on it writes nothing.
    quiet_at: Option<Percent>,
    told: Vec<u8>,
    stopped: bool,
    resumed: bool,
    put_back: u64,
}

impl Busy {
    fn quiet_at(percent: u8) -> Self {
        Self(Arc::new(Mutex::new(State { quiet_at: Some(Percent::new(percent)), ..State::default() })))
    }

    fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.0.lock().expect("no panic"))
    }
}

impl DirtyLog for Busy {
    fn begin(&mut self, _blocks: &RamBlocks) -> io::Result<()> {
        Ok(())
    }
    fn take(&mut self, _block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let quiet = self.look(|state| {
            let percent = Percent::new(state.told.last().copied().unwrap_or_default());
            state.stopped || state.quiet_at.is_some_and(|at| percent >= at)
        });
        if !quiet {
            into.add_run(PageIndex(0), PAGES);
        }
        Ok(())
    }

    fn put_back(&mut self, _block: BlockIndex, from: &PageBitmap) {
        self.look(|state| state.put_back += from.count());
    }
}

impl Guest for Busy {
    fn devices(&self) -> Vec<DeviceInfo> {
        Vec::new()
    }
    fn run_state(&mut self) -> RunState {
        RunState::Running
    }
    fn stop(&mut self) -> io::Result<()> {
        self.look(|state| state.stopped = true);
        Ok(())
    }
    fn save(&mut self) -> io::Result<Vec<DeviceSection>> {
        Ok(Vec::new())
    }

    fn resume(&mut self) {
        self.look(|state| state.resumed = true);
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, stand: Percent) -> io::Result<()> {
        self.look(|state| state.told.push(stand.get()));
        Ok(())
    }
}

/// Migrates over two channels in memory; `meanwhile` runs at the same time.
fn migrate<T: Send + 'static>(
    options: MigrateOptions,
    log: &mut dyn DirtyLog,
    guest: &mut dyn Guest,
    meanwhile: impl FnOnce(Control, Progress, Stop) -> T + Send + 'static,
) -> (Result<MigrationInfo, Error>, T, Option<String>) {
    let (connector, listener) = memory::network(1 << 18);
    let (source, arrived) = (source(), fresh(PageSize::KIB_4, RAM));
    let destination = spawn("destination", {
        let blocks = arrived.clone();
        move || receive(receiver(), Box::new(listener), blocks)
    });
    let stop = Stop::new();
    let mut main = TestMain::connect(&connector, &stop);
    let mut sender = Sender::new(SendOptions::new(), source.clone(), stop.clone()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let migration = Migration::new(options, sender).expect("options");
    let (control, progress) = (migration.control(), migration.progress());
    let beside = spawn("meanwhile", move || meanwhile(control, progress, stop));
    let sent = migration.run(&mut main, log, guest);
    drop(main);
    let beside = beside.join().expect("no panic");
    let received = destination.join().expect("no panic");
    assert_eq!(sent.is_ok(), received.is_ok(), "{sent:?} {received:?}");
    (sent, beside, difference(&source, &arrived))
}

fn receiver() -> multifd::Receiver {
    multifd::Receiver::new(multifd::ReceiveOptions::new(), Stop::new())
}

fn source() -> Arc<RamBlocks> {
    let blocks = fresh(PageSize::KIB_4, RAM);
    (0..PAGES).for_each(|page| write(&blocks, 0, page, 1));
    blocks
}

#[test]
fn guest_that_is_held_back_converges_and_is_let_go_when_it_has_stopped() {
    // A second for a pass.
    let options = MigrateOptions::new().auto_converge(true).max_bandwidth(Some(1 << 20));
    let guest = Busy::quiet_at(20);
    let (sent, (), difference) = migrate(options, &mut guest.clone(), &mut guest.clone(), |_, _, _| ());
    let info = sent.expect("sent");
    assert_eq!((info.cpu_throttle_percentage, difference), (Some(20), None));
    guest.look(|state| assert_eq!((&state.told[..], state.resumed), (&[0, 20, 0][..], false)));
}

#[test]
fn guest_that_cannot_be_held_back_is_told_of_before_anything_is_sent() {
    let options = MigrateOptions::new().auto_converge(true);
    let (sent, progress, _) =
        migrate(options, &mut NeverDirty, &mut StoppedGuest::default(), |_, progress, _| progress);
    let error = sent.expect_err("refused");
    assert_eq!(
        error.to_string(),
        "auto-converge needs a guest that can be throttled (Guest::throttle): switch auto-converge off"
    );
    let info = progress.info();
    assert_eq!((info.status, info.ram.transferred), (Status::Failed, 0));
}

#[test]
fn guest_that_never_fits_into_the_downtime_is_told_of_and_runs_on_after_the_last_pass() {
    let options = MigrateOptions::new().downtime_limit(Duration::ZERO).max_passes(Some(5));
    let guest = Busy::default();
    let (sent, progress, _) =
        migrate(options, &mut guest.clone(), &mut guest.clone(), |_, progress, _| progress);
    let error = sent.expect_err("given up");
    let Error::NotConverged(found) = error.kind() else { panic!("{error:?}") };
    assert_eq!(found.bound, Bound::Passes(5));
    let stall = found.stall.as_ref().expect("a stall");
    let advice = &stall.remedies[..];
    assert!(
        matches!(advice, [Remedy::Channels(2), Remedy::AutoConverge, Remedy::DowntimeLimit(_)]),
        "{advice:?}"
    );
    let text = error.to_string();
    assert!(text.starts_with(
        "not complete after 5 passes (max-passes), so the guest continues at the source: will not "
    ));
    let info = progress.info();
    assert_eq!((info.status, info.stall.as_ref()), (Status::Failed, Some(stall)));
    // Before the first pass, and after each of the five.
    assert_eq!(info.ram.dirty_sync_count, 6);
    guest.look(|state| {
        assert_eq!((state.stopped, state.resumed, state.put_back), (false, false, PAGES));
        assert!(state.told.is_empty(), "it was not asked for");
    });
}

/// At 1000 bytes a second the migration would take 17 minutes.
#[test]
fn max_bandwidth_can_be_changed_while_the_migration_waits_for_it() {
    let options = MigrateOptions::new().max_bandwidth(Some(1000));
    let (sent, (), difference) =
        migrate(options, &mut NeverDirty, &mut StoppedGuest::default(), |control, progress, _| {
            while progress.info().status != Status::Active {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(100));
            assert!(progress.info().ram.remaining > (1 << 19), "the limit holds");
            assert_eq!(control.max_bandwidth(), Some(1000));
            control.set_max_bandwidth(Some(0));
            assert_eq!(control.max_bandwidth(), None);
        });
    sent.expect("sent");
    assert_eq!(difference, None);
}

#[test]
fn guest_that_may_stand_for_longer_after_all_is_stopped() {
    let options = MigrateOptions::new().downtime_limit(Duration::ZERO);
    let guest = Busy::default();
    let (sent, (), difference) =
        migrate(options, &mut guest.clone(), &mut guest.clone(), |control, progress, _| {
            let refused = control.set_downtime_limit(Duration::from_secs(2001)).expect_err("refused");
            assert_eq!(refused.to_string(), "expected downtime-limit 0 to 2000000, found 2001000");
            // It makes passes, and would for ever.
            while progress.info().stall.is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            control.set_downtime_limit(Duration::from_secs(2000)).expect("taken");
        });
    assert_eq!((sent.expect("sent").status, difference), (Status::Completed, None));
}

/// A pass that no destination reads has no end at which the clock could be checked.
#[test]
fn time_that_is_over_ends_a_pass_that_stands() {
    let (connector, _listener) = memory::network(1 << 12);
    let (stop, blocks) = (Stop::new(), source());
    let mut main = TestMain::connect(&connector, &stop);
    let mut sender = Sender::new(SendOptions::new(), blocks.clone(), stop.clone()).expect("made");
    sender.set_up(Arc::new(connector)).expect("set up");
    let limit = Duration::from_millis(200);
    let options = MigrateOptions::new().max_total_time(Some(limit));
    let mut guest = StoppedGuest::default();
    let error = Migration::new(options, sender)
        .expect("options")
        .run(&mut main, &mut NeverDirty, &mut guest)
        .expect_err("given up");
    assert!(
        matches!(error.kind(), Error::NotConverged(found) if found.bound == Bound::Time(limit)),
        "{error}"
    );
    assert!(!guest.resumed, "it never stopped");
}

#[test]
fn time_that_is_enough_ends_nothing() {
    let options = MigrateOptions::new().max_total_time(Some(Duration::from_secs(600)));
    let (sent, (), difference) =
        migrate(options, &mut NeverDirty, &mut StoppedGuest::default(), |_, _, _| ());
    assert_eq!((sent.expect("sent").status, difference), (Status::Completed, None));
}

#[test]
fn migration_waits_before_the_switchover_until_it_is_told_to_go_on() {
    let options = MigrateOptions::new().pause_before_switchover(true);
    let guest = Busy::quiet_at(0);
    let seen = guest.clone();
    let (sent, (), difference) =
        migrate(options, &mut guest.clone(), &mut guest.clone(), move |control, progress, _| {
            assert!(control.wait_pre_switchover());
            assert_eq!(progress.status(), Status::PreSwitchover);
            seen.look(|state| assert!(state.stopped && !state.resumed));
            control.proceed().expect("it waits");
            assert!(!control.wait_pre_switchover(), "once");
        });
    assert_eq!((sent.expect("sent").status, difference), (Status::Completed, None));
    guest.look(|state| assert!(!state.resumed));
}

#[test]
fn cancel_ends_the_wait_before_the_switchover_and_the_guest_runs_on() {
    let options = MigrateOptions::new().pause_before_switchover(true);
    let guest = Busy::quiet_at(0);
    let (sent, control, _) = migrate(options, &mut guest.clone(), &mut guest.clone(), |control, _, stop| {
        assert!(control.wait_pre_switchover());
        stop.cancel();
        control
    });
    assert!(sent.expect_err("cancelled").is_cancelled());
    guest.look(|state| assert_eq!((state.stopped, state.resumed, state.put_back), (true, true, PAGES)));
    let late = control.proceed().expect_err("over");
    assert_eq!(
        late.to_string(),
        "the migration is cancelled: it can only be continued when it is pre-switchover"
    );
    assert!(!control.wait_pre_switchover());
}

#[test]
fn migration_that_does_not_wait_cannot_be_told_to_go_on() {
    let migration = Migration::over_main(MigrateOptions::new(), source(), Stop::new()).expect("options");
    let control = migration.control();
    let early = control.proceed().expect_err("early");
    assert!(matches!(early.kind(), Error::Usage(Usage::NotPaused { found: Status::None })), "{early}");
    let (sent, waited, _) =
        migrate(MigrateOptions::new(), &mut NeverDirty, &mut StoppedGuest::default(), |control, _, _| {
            control.wait_pre_switchover()
        });
    assert!(sent.is_ok() && !waited);
    drop(migration);
    assert!(!control.wait_pre_switchover(), "it will never be");
}
