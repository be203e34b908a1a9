//! Kills the source of post-copy at random moments, again and again. `cargo xtask soak --postcopy` runs it.
//!
//! After each kill the destination is asked what it has: a guest that has not started is started anew out of the file, one that
//! waits gets the rest of its pages. In the end it checks all of its memory.

use std::{
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use fastrand::Rng;
use multifd_testkit::{
    number,
    qemu::{Error, PATIENCE, Qemu, Vm},
};
use rustix::process::Signal;
use tempfile::TempDir;

use super::postcopy::{assert_checks_all, captured, recovering, waiting};
use crate::kit::feed;

/// What a destination is found in after a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// The guest never started, and the process has ended or will not take it.
    NotStarted,
    Paused,
    Completed,
}

#[test]
#[ignore = "soak: cargo xtask soak --postcopy"]
fn killed_sources_never_lose_a_guest() {
    let first = number("MULTIFD_POSTCOPY_SEED").unwrap_or(1);
    let seconds = number("MULTIFD_POSTCOPY_SECONDS");
    let wanted = number("MULTIFD_POSTCOPY_KILLS").unwrap_or(if seconds.is_some() { u64::MAX } else { 20 });
    let begun = Instant::now();
    let files: Vec<(Qemu, TempDir, PathBuf)> = [Qemu::v7_2(), Qemu::v10_0()]
        .into_iter()
        .flatten()
        .map(|qemu| {
            let (folder, file, from) = captured(&qemu).expect("captured");
            drop(from);
            (qemu, folder, file)
        })
        .collect();
    if files.is_empty() {
        return;
    }
    let (mut kills, mut lives, mut resumed, mut anew) = (0, 0, 0, 0);
    for seed in first.. {
        if kills >= wanted || seconds.is_some_and(|limit| begun.elapsed().as_secs() >= limit) {
            break;
        }
        let mut random = Rng::with_seed(seed);
        let (qemu, _, file) = &files[random.usize(..files.len())];
        let lived = live(qemu, file, &mut random);
        let (killed, again) = lived.unwrap_or_else(|error| {
            panic!(
                "seed {seed}, QEMU {}: {error}; again: cargo xtask soak --postcopy --kills 1 --seed {seed}",
                qemu.series()
            )
        });
        kills += killed;
        lives += 1;
        resumed += killed - again;
        anew += again;
    }
    println!(
        "{lives} guests, {kills} kills: {resumed} resumed or complete, {anew} started anew; none lost, no wrong word"
    );
}

/// One guest, from its start to its last page. Returns how often its source was killed, and how often it was started anew.
fn live(qemu: &Qemu, file: &Path, random: &mut Rng) -> Result<(u64, u64), Error> {
    let preempt = random.bool();
    // QEMU 7.2 ends with a signal when the first connection after migrate-recover closes before it has sent anything.
    let resumes_are_killed = qemu.series() != "7.2";
    let (mut killed, mut anew) = (0, 0);
    let (mut to, mut address) = waiting(qemu, preempt)?;
    let mut resumes = false;
    for _ in 0..random.u32(1..6) {
        if resumes && !resumes_are_killed {
            break;
        }
        let bandwidth = format!("{}K", random.u32(200..20_000));
        let mut options = vec![if resumes { "--resume" } else { "--postcopy-ram" }, "--no-working-set"];
        options.extend(["--max-postcopy-bandwidth", &bandwidth]);
        if preempt {
            options.push("--postcopy-preempt");
        }
        let sent = feed(&options, file, &address);
        // Most kills come early, where most happens.
        let magnitude = random.u32(8..19);
        sleep(Duration::from_micros(random.u64(..1 << magnitude)));
        sent.signal(Signal::KILL);
        if sent.end().code.is_some() {
            break;
        }
        killed += 1;
        match found(&mut to)? {
            Found::Paused => {
                address = recovering(&mut to)?;
                resumes = true;
            }
            Found::Completed => return assert_checks_all(&mut to).map(|()| (killed, anew)),
            Found::NotStarted => {
                assert!(!resumes, "a guest that has run is never gone");
                (to, address) = waiting(qemu, preempt)?;
                anew += 1;
            }
        }
    }
    if found_now(&mut to)? != Some(Found::Completed) {
        let mut options = vec![if resumes { "--resume" } else { "--postcopy-ram" }, "--no-working-set"];
        if preempt {
            options.push("--postcopy-preempt");
        }
        feed(&options, file, &address).done();
    }
    to.wait_migration("completed", PATIENCE)?;
    assert_checks_all(&mut to)?;
    Ok((killed, anew))
}

/// Waits until the destination has noticed that its source is gone.
fn found(to: &mut Vm) -> Result<Found, Error> {
    let begun = Instant::now();
    loop {
        if let Some(found) = found_now(to)? {
            return Ok(found);
        }
        // It was killed before it had connected: the destination waits for another one.
        if begun.elapsed() > Duration::from_secs(2)
            && to.query_migrate()?["status"].as_str() != Some("postcopy-active")
        {
            return Ok(Found::NotStarted);
        }
        assert!(begun.elapsed() < PATIENCE, "{:?}", to.query_migrate());
        sleep(Duration::from_millis(10));
    }
}

fn found_now(to: &mut Vm) -> Result<Option<Found>, Error> {
    if to.ended()?.is_some() || stuck(to)? {
        return Ok(Some(Found::NotStarted));
    }
    let told = match to.query_migrate() {
        Ok(told) => told,
        // It has ended, or got stuck, in the meantime.
        Err(error) => {
            for _ in 0..200 {
                if to.ended()?.is_some() || stuck(to)? {
                    return Ok(Some(Found::NotStarted));
                }
                sleep(Duration::from_millis(10));
            }
            return Err(error);
        }
    };
    Ok(match told["status"].as_str() {
        Some("failed") => Some(Found::NotStarted),
        Some("postcopy-paused") => Some(Found::Paused),
        Some("completed") => Some(Found::Completed),
        _ => None,
    })
}

/// Whether QEMU needed a page to load the devices when its source ended: its monitor waits for that without end. The guest has not
/// started. The process is killed.
fn stuck(to: &mut Vm) -> Result<bool, Error> {
    if !to.stderr().contains("postcopy_ram_listen_thread: loadvm failed") {
        return Ok(false);
    }
    assert!(to.serial()?.is_empty(), "{:?}", to.serial()?);
    to.kill()?;
    Ok(true)
}
