//! Guests that run before their RAM is there, over the network.

#![cfg(test)]

mod broken;
mod hostile;
mod hostile_resumed;
mod kind;
mod lost;
mod machine;
mod network;
mod qemu;
mod switch;
mod tampered;

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use multifd::{
    Error, ReceiveOptions,
    channel::{Address, Listen, Stop},
    live::{MigrateOptions, PostcopyWhen, RunState, Status, ZeroPageDetection},
    ram::{FaultError, FaultsFrom, Features, RamBlocks, Userfault},
};
use qemu_stream::{
    arrival::{Arrival, ArrivalOptions, EarlyOptions, Finished, Landing},
    format::{Configuration, MachineType},
    incoming::Expected,
    outgoing::postcopy::{Moved, PostcopyOptions},
    source::{Source, SourceOptions},
};

use kind::Kind;
use machine::{DEVICE, Machine, STATE, Shadow, memory};
use network::Network;

const LIMIT: Duration = Duration::from_secs(60);

fn machine_type() -> MachineType {
    MachineType::new("early-1").expect("a name")
}

/// Whether this process may receive the faults of everything.
fn may_run() -> bool {
    match Userfault::open(Features::POISON, FaultsFrom::Everything) {
        Ok(_) => true,
        Err(
            error @ (FaultError::NotPermitted { .. } | FaultError::Lacks { .. } | FaultError::NoUserfaultfd),
        ) => {
            multifd_testkit::lacks(&error.to_string());
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// Waits for a machine, runs it, and returns it with all of its RAM.
fn arrive(
    listener: impl Listen + 'static,
    shadow: Shadow,
    seed: u64,
) -> JoinHandle<Result<(Machine, Option<Finished>), Error>> {
    arrive_in(listener, shadow, seed, memory)
}

/// The same in other memory.
fn arrive_in(
    listener: impl Listen + 'static,
    shadow: Shadow,
    seed: u64,
    memory: impl FnOnce() -> RamBlocks + Send + 'static,
) -> JoinHandle<Result<(Machine, Option<Finished>), Error>> {
    thread::spawn(move || {
        // A source that is cut before its first byte does not come back.
        let receive = ReceiveOptions::new().accept_timeout(Some(Duration::from_secs(2)));
        let options = ArrivalOptions::new(Expected::Type(machine_type())).receive(receive);
        let options = options.run_early(true).pause_timeout(Some(Duration::from_secs(20)));
        let arrival = Arrival::listen(listener, options, &Stop::new())?.accept()?;
        let landing = arrival.announced()?.load_early(memory(), EarlyOptions::new())?;
        let early = match landing {
            Landing::Complete(pending) => {
                let confirmed = pending.confirm()?;
                let mut machine = Machine::new(confirmed.blocks().clone(), shadow);
                machine.run(seed);
                confirmed.finish();
                return Ok((machine, None));
            }
            Landing::Early(early) => early,
        };
        let (_, state) = early.device(DEVICE.as_str(), 0).expect("described");
        assert_eq!(state, STATE);
        let mut running = early.confirm()?;
        assert_eq!(running.run_state(), RunState::Running);
        let mut machine = Machine::new(running.blocks().clone(), shadow);
        machine.run(seed);
        assert!(running.wait(Some(LIMIT)), "{running:?}");
        let finished = running.finish()?;
        Ok((machine, Some(finished)))
    })
}

fn source(blocks: &Arc<RamBlocks>, channels: u8, when: PostcopyWhen, stop: &Stop) -> Source {
    source_of(&Kind::default(), blocks, channels, when, stop)
}

fn source_of(kind: &Kind, blocks: &Arc<RamBlocks>, channels: u8, when: PostcopyWhen, stop: &Stop) -> Source {
    // A pass takes at least 100 ms.
    let migrate = MigrateOptions::new().postcopy(when).downtime_limit(Duration::ZERO);
    let migrate = migrate.max_bandwidth(Some(20_000_000));
    let migrate = migrate.zero_page_detection(ZeroPageDetection::Multifd);
    // The rest takes about 200 ms.
    let postcopy = PostcopyOptions::new().max_postcopy_bandwidth(Some(40_000_000));
    let options = SourceOptions::new(Configuration::new(machine_type())).channels(channels);
    let options = kind.source(options.migrate(migrate), postcopy, channels);
    Source::new(blocks.clone(), options, stop).expect("options")
}

/// It would be found only when the guest is stopped for the switch.
#[test]
fn a_connection_that_cannot_be_used_in_both_directions_is_refused_at_once() {
    let mut machine = Machine::new(Arc::new(memory()), Shadow::new());
    let mut log = machine.writes.clone().reader().expect("the only one");
    let address: Address = "exec:cat > /dev/null".parse().expect("an address");
    let source = source(&machine.blocks, 0, PostcopyWhen::Request, &Stop::new());
    let refused = source.run(address, &mut log, &mut machine).expect_err("it cannot switch");
    assert!(refused.to_string().contains("use tcp or a unix socket"), "{refused}");
}

#[test]
fn a_busy_guest_moves_before_its_ram_and_finds_every_write() {
    if !may_run() {
        return;
    }
    let (plain, preempt) = (Kind::default(), Kind::default().preempt(true));
    for (kind, channels) in [(&plain, 0), (&preempt, 0), (&plain, 1), (&plain, 2), (&plain, 5)] {
        // Within the first pass, so that passes cannot end before.
        for when in [PostcopyWhen::Start, PostcopyWhen::After(Duration::from_millis(20))] {
            let what = format!("{channels} channels of {kind:?}, {when}");
            let shadow = Shadow::new();
            let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
            machine.run(1);
            shadow.wait_written(2000);
            let (listener, network) = Network::listen();
            let arriving = arrive(listener, shadow.clone(), 2);
            let mut log = machine.writes.clone().reader().expect("the only one");
            let source = source_of(kind, &machine.blocks, channels, when, &Stop::new());
            let moved = source.run(network, &mut log, &mut machine);
            let moved = moved.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            let Moved::Completed { info, postcopy } = moved else { panic!("{what}: {moved:?}") };
            assert!(info.downtime.is_some(), "{what}");
            let postcopy = postcopy.expect("it has switched");
            assert_eq!(postcopy.over_channels, channels > 0, "{what}");
            assert_eq!(postcopy.remaining, Some(0), "{what}");
            let (mut there, finished) = arriving.join().expect("no panic").expect("arrived");
            let finished = finished.unwrap_or_else(|| panic!("{what}: it did not switch"));
            assert_eq!(finished.faults.missing, 0, "{what}");
            there.halt();
            assert_eq!(shadow.wrong(), None, "{what}");
            shadow.check(&there.blocks).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
            assert_eq!((machine.stops, machine.resumes), (1, 0), "{what}");
        }
    }
}

#[test]
fn a_request_ends_a_pass_and_the_guest_leaves_at_once() {
    if !may_run() {
        return;
    }
    let shadow = Shadow::new();
    let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
    machine.run(1);
    let (listener, network) = Network::listen();
    let arriving = arrive(listener, shadow.clone(), 2);
    let mut log = machine.writes.clone().reader().expect("the only one");
    // The first pass would take hours.
    let migrate = MigrateOptions::new().postcopy(PostcopyWhen::Request).max_bandwidth(Some(1000));
    let options = SourceOptions::new(Configuration::new(machine_type())).migrate(migrate);
    let source = Source::new(machine.blocks.clone(), options, &Stop::new()).expect("options");
    let (control, progress) = (source.control(), source.progress());
    let requests = thread::spawn(move || {
        while progress.status() != Status::Active {
            thread::sleep(Duration::from_millis(1));
        }
        control.start_postcopy().expect("allowed");
    });
    let moved = source.run(network, &mut log, &mut machine).expect("moved");
    requests.join().expect("no panic");
    assert!(matches!(moved, Moved::Completed { .. }), "{moved:?}");
    let (mut there, finished) = arriving.join().expect("no panic").expect("arrived");
    finished.expect("it has switched");
    there.halt();
    assert_eq!(shadow.wrong(), None);
    shadow.check(&there.blocks).expect("right");
}

#[test]
fn what_is_cut_at_any_moment_is_resumed_or_was_never_gone() {
    if !may_run() {
        return;
    }
    let rounds = multifd_testkit::number("MULTIFD_EARLY_ROUNDS").unwrap_or(24);
    let first = multifd_testkit::number("MULTIFD_EARLY_SEED").unwrap_or(1);
    let mut tally = std::collections::BTreeMap::<&str, u64>::new();
    for seed in first..first + rounds {
        let outcome = round(seed, &Kind::default()).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        if seed % 50 == 0 {
            println!("seed {seed}: {tally:?}");
        }
        *tally.entry(outcome).or_default() += 1;
    }
    println!("{rounds} rounds from seed {first} on: {tally:?}");
}

#[test]
fn huge_pages_tls_and_compression_arrive_whole_and_survive_cuts() {
    if !may_run() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let plain = Kind::default();
    let huge = plain.clone().huge();
    let kinds = [
        ("TLS", Some(plain.clone().tls(folder.path()))),
        ("zlib", Some(plain.clone().compressed("zlib"))),
        ("zstd", Some(plain.clone().compressed("zstd"))),
        ("TLS and zstd", Some(plain.clone().tls(folder.path()).compressed("zstd"))),
        ("huge pages", huge.clone()),
        ("huge pages, TLS and zlib", huge.map(|kind| kind.tls(folder.path()).compressed("zlib"))),
    ];
    let rounds = multifd_testkit::number("MULTIFD_EARLY_KINDS").unwrap_or(3);
    for (name, kind) in kinds {
        let Some(kind) = kind else { continue };
        let preempt = kind.clone().preempt(true);
        for (kind, channels) in [(&kind, 1), (&kind, 4), (&kind, 0), (&preempt, 0)] {
            whole(kind, channels).unwrap_or_else(|wrong| panic!("{name}, {channels} channels: {wrong}"));
        }
        for seed in 1..=rounds {
            let outcome = round(seed, &kind).unwrap_or_else(|wrong| panic!("{name}, seed {seed}: {wrong}"));
            println!("{name}, seed {seed}: {outcome}");
        }
    }
}

/// A migration that nobody cuts.
fn whole(kind: &Kind, channels: u8) -> Result<(), String> {
    let shadow = Shadow::new();
    let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
    machine.run(1);
    shadow.wait_written(2000);
    let (listener, network) = Network::listen();
    let arriving = arrive_in(kind.listener(listener), shadow.clone(), 2, kind.memory());
    let mut log = machine.writes.clone().reader().expect("the only one");
    let source = source_of(kind, &machine.blocks, channels, PostcopyWhen::Start, &Stop::new());
    let moved = source.run(kind.connector(&network), &mut log, &mut machine);
    let arrived = arriving.join().expect("no panic");
    let (Moved::Completed { postcopy: Some(postcopy), .. }, (mut there, finished)) = (match (moved, arrived) {
        (Ok(moved), Ok(arrived)) => (moved, arrived),
        (moved, arrived) => {
            return Err(format!("source {moved:?}, destination {:?}", arrived.map(|(_, finished)| finished)));
        }
    }) else {
        return Err("it did not switch".to_owned());
    };
    assert_eq!((postcopy.over_channels, postcopy.remaining), (channels > 0, Some(0)), "{postcopy:?}");
    assert_eq!(finished.map(|finished| finished.faults.missing), Some(0));
    there.halt();
    shadow.wrong().map_or(Ok(()), Err)?;
    shadow.check(&there.blocks)
}

/// A migration whose connections are cut several times.
fn round(seed: u64, kind: &Kind) -> Result<&'static str, String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let shadow = Shadow::new();
    let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
    machine.run(seed);
    let (listener, network) = Network::listen();
    let connector = kind.connector(&network);
    let arriving = arrive_in(kind.listener(listener), shadow.clone(), seed + 1, kind.memory());
    let mut log = machine.writes.clone().reader().expect("the only one");
    let channels = *random.choice(&[0, 1, 2, 4]).expect("one");
    let when = *random.choice(&[PostcopyWhen::Start, PostcopyWhen::Passes(1)]).expect("one");
    let kind = &kind.clone().preempt(random.bool());
    let stop = Stop::new();
    let cutter = thread::spawn({
        let (network, mut random) = (network.clone(), random.fork());
        move || {
            for _ in 0..random.u64(1..4) {
                thread::sleep(Duration::from_micros(random.u64(0..250_000)));
                let which = random.bool().then(|| random.usize(..8));
                network.cut(which);
            }
        }
    });
    let source = source_of(kind, &machine.blocks, channels, when, &stop);
    let moved = source.run(connector.clone(), &mut log, &mut machine);
    let (mut interruptions, begun) = (0, Instant::now());
    let moved = match moved {
        Ok(Moved::Interrupted(mut interrupted)) => loop {
            interruptions += 1;
            let resumed = interrupted.resume_within(
                LIMIT.saturating_sub(begun.elapsed()),
                connector.clone(),
                &Stop::new(),
                &mut log,
                &mut machine,
            );
            match resumed {
                Ok(Moved::Interrupted(again)) if interruptions < 50 && begun.elapsed() < LIMIT => {
                    interrupted = again;
                }
                resumed => break resumed,
            }
        },
        moved => moved,
    };
    cutter.join().expect("no panic");
    let arrived = arriving.join().expect("no panic");
    let what = format!("{channels} channels of {kind:?}, {when}, {interruptions} interruptions");
    let (mut place, outcome) = match (moved, arrived) {
        (Ok(Moved::Completed { .. }), Ok((there, _))) => {
            if machine.is_running() {
                return Err(format!("{what}: two guests"));
            }
            (there, if interruptions > 0 { "resumed" } else { "not interrupted" })
        }
        (Err(error), Err(refused)) => {
            if !machine.is_running() {
                return Err(format!("{what}: no guest: {error:?}, {refused:?}"));
            }
            (machine, if interruptions > 0 { "back after the switch" } else { "stayed" })
        }
        (moved, arrived) => {
            let arrived = arrived.map(|(_, finished)| finished);
            return Err(format!("{what}: source {moved:?}, destination {arrived:?}"));
        }
    };
    thread::sleep(Duration::from_millis(5));
    place.halt();
    if let Some(wrong) = shadow.wrong() {
        return Err(format!("{what}, {outcome}: {wrong}"));
    }
    shadow.check(&place.blocks).map_err(|wrong| format!("{what}, {outcome}: {wrong}"))?;
    Ok(outcome)
}

#[test]
fn a_destination_that_does_not_serve_post_copy_says_so_and_the_guest_continues() {
    for channels in [0, 2] {
        let shadow = Shadow::new();
        let mut machine = Machine::new(Arc::new(memory()), shadow.clone());
        machine.run(1);
        let (listener, network) = Network::listen();
        let arriving = thread::spawn(move || {
            let options = ArrivalOptions::new(Expected::Type(machine_type()));
            let announced = Arrival::listen(listener, options, &Stop::new())?.accept()?.announced()?;
            announced.load(memory()).map(drop)
        });
        let mut log = machine.writes.clone().reader().expect("the only one");
        let stop = Stop::new();
        let moved = source(&machine.blocks, channels, PostcopyWhen::Start, &stop).run(
            network,
            &mut log,
            &mut machine,
        );
        let refused = arriving.join().expect("no panic").expect_err("refused");
        let error = multifd::error::chain(&moved.expect_err("refused")).to_string();
        assert!(error.contains("postcopy-ram"), "{error}\n{}", multifd::error::chain(&refused));
        assert!(machine.is_running() && (machine.stops, machine.resumes) == (1, 1));
    }
}
