//! Lives of machines, all different: they run, hop from host to host, are captured and restored, with faults in many
//! steps. After each step one host has the complete guest.
//!
//! ```text
//! seed ─▶ plan ─▶ machine and shadow ─▶ step ─▶ checked ─▶ step ─▶ checked …
//!                                        ├ hop: source ══ destination
//!                                        ├ capture ─▶ file ─▶ restore
//!                                        └ writes, pauses, blocks plugged and unplugged
//! ```
//!
//! It is one test in a separate process, because it counts the threads and descriptors of the process. By default it
//! makes [`LIVES`] lives from one seed on; `cargo xtask soak --lives` runs for the given time. The seed determines the
//! steps but not the timing of threads, so a failure that needs a certain timing may take several attempts to repeat.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{Write as _, stderr},
    panic,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use multifd::channel::tls::{ClientCredentials, ServerCredentials};
use multifd_testkit::{certificates, number};

mod destination;
mod faults;
mod hop;
mod life;
mod machine;
mod memory;
mod network;
mod plan;
mod shadow;
mod snapshot;
mod trouble;

use faults::ON_PURPOSE;
use hop::Outcome;
use life::Life;
use network::Means;
use plan::Plan;

type Tally = BTreeMap<String, BTreeMap<Outcome, u64>>;

#[test]
fn after_each_step_of_a_life_one_host_has_the_guest_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates::write_both(folder.path()).expect("certificates");
    let client = ClientCredentials::load(folder.path(), "127.0.0.1").expect("the source's credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("the destination's credentials");
    let means = Means { client, server, folder };
    expect_panics();
    let watch = Watch::start();
    let (first, seconds) = (number("MULTIFD_LIVES_SEED").unwrap_or(1), number("MULTIFD_LIVES_SECONDS"));
    let most = number("MULTIFD_LIVES_COUNT").unwrap_or(if seconds.is_some() { u64::MAX } else { LIVES });
    let steps = number("MULTIFD_LIVES_STEPS").unwrap_or(STEPS);
    let (start, mut said) = (Instant::now(), Instant::now());
    let (mut tally, mut wrong, mut lives, mut made) = (Tally::new(), Vec::new(), 0_u64, 0_u64);
    for seed in (first..).take(usize::try_from(most).unwrap_or(usize::MAX)) {
        if seconds.is_some_and(|seconds| start.elapsed().as_secs() >= seconds) {
            break;
        }
        lives += 1;
        if let Err((step, text)) = live(seed, steps, &means, &watch, &mut tally, &mut made) {
            println!("WRONG: seed {seed}, {step}: {text}");
            wrong.push(seed);
            if wrong.len() >= ENOUGH {
                break;
            }
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            println!("{lives} lives in {} s, {} wrong", start.elapsed().as_secs(), wrong.len());
        }
    }
    println!("{lives} lives, {made} steps from seed {first} on in {} s", start.elapsed().as_secs());
    println!("{:<36} {:>7} {:>7} {:>7}", "step", "done", "stayed", "unknown");
    for (kind, outcomes) in &tally {
        let of = |outcome| outcomes.get(&outcome).copied().unwrap_or_default();
        let (done, stayed, unknown) = (of(Outcome::Done), of(Outcome::Stayed), of(Outcome::Unknown));
        println!("{kind:<36} {done:>7} {stayed:>7} {unknown:>7}");
    }
    assert!(lives > 0, "nothing was tried");
    assert!(
        wrong.is_empty(),
        "wrong: seeds {wrong:?}; each again, though threads may meet at other moments: \
         cargo xtask soak --lives --lives-count 1 --steps {steps} --seed SEED"
    );
}

/// One life. An error names the step.
fn live(
    seed: u64,
    steps: u64,
    means: &Means,
    watch: &Watch,
    tally: &mut Tally,
    made: &mut u64,
) -> Result<(), (String, String)> {
    let plan = Plan::new(seed, steps);
    watch.step(format!("seed {seed}, its beginning"));
    let mut life = Life::begin(&plan);
    for (number, step) in plan.steps.iter().enumerate() {
        watch.step(format!("seed {seed}, step {number}: {step:?}"));
        let outcomes = life.step(step, means).map_err(|text| {
            let Plan { page_size, blocks, load, .. } = &plan;
            (
                format!("step {number}"),
                format!("{text}\n  {step:?}\n  {page_size}, {blocks:?} pages, {load:?}"),
            )
        })?;
        *made += 1;
        for (kind, outcome) in outcomes {
            *tally.entry(kind).or_default().entry(outcome).or_default() += 1;
        }
    }
    watch.step(format!("seed {seed}, its end"));
    life.end().map_err(|text| ("its end".to_owned(), text))
}

/// Ends the process when a step hangs, which nothing else could.
struct Watch(Arc<Mutex<(Instant, String)>>);

impl Watch {
    fn start() -> Self {
        let now = Arc::new(Mutex::new((Instant::now(), String::new())));
        let watched = now.clone();
        let watch = move || {
            loop {
                thread::sleep(Duration::from_secs(1));
                let (since, step) = watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if since.elapsed() > HANG {
                    // Not with a macro: a test's output is shown at its end, and this test has no end.
                    let seconds = HANG.as_secs();
                    let _ = writeln!(stderr(), "WRONG: {step}: hangs for {seconds} s\n{}", standing());
                    std::process::abort();
                }
            }
        };
        thread::Builder::new().name("watch".into()).spawn(watch).expect("a thread");
        Self(now)
    }

    fn step(&self, step: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), step);
    }
}

/// The threads of this process and their positions.
fn standing() -> String {
    let mut text = String::new();
    for task in fs::read_dir("/proc/self/task").expect("the process's own").flatten() {
        let of = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let _ = writeln!(text, "{} in {} {}", of("comm").trim(), of("wchan").trim(), of("syscall").trim());
    }
    text
}

/// Hides the output of panics that are made here.
fn expect_panics() {
    let told = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let on_purpose = |text: &str| text.contains(ON_PURPOSE);
        let payload = panic.payload();
        let text =
            payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        if !text.is_some_and(on_purpose) {
            told(panic);
        }
    }));
}

/// The default number of lives.
const LIVES: u64 = 24;
const STEPS: u64 = 10;
/// No step takes as long, on a machine with other load.
const HANG: Duration = Duration::from_secs(60);
/// Failures until a run ends.
const ENOUGH: usize = 5;
