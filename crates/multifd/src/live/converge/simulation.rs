//! Simulates thousands of migrations: a model guest over a model link, judged by the production code.
//!
//! The guest writes to two sets of pages, a hot and a cold one, at fluctuating rates. The link has a fluctuating
//! bandwidth and a latency. Time is a number that the model increments. A seed determines every run; a failure prints
//! it.

use std::time::Duration;

use super::{Converge, Judgement, Round, Step, ZERO_ENTRY};
use crate::{
    live::{MigrateOptions, Percent},
    outcome::{Bound, Remedy},
    ram::PageSize,
    slices::Slices,
};

const PAGE: u64 = 4096;
/// Bytes of a page on the wire, with its share of a packet's head.
const PAGE_COST: u64 = PAGE + 12;
const MOST_PASSES: u64 = 200;

/// Reproducible pseudo-random numbers (a splitmix sequence).
struct Random(u64);

impl Random {
    /// From 0 to 1.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) as f64 / u64::MAX as f64
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.next()
    }

    /// A random number on a logarithmic scale: as likely between 1 and 2 as between 100 and 200.
    fn decades(&mut self, low: f64, high: f64) -> f64 {
        low * (high / low).powf(self.next())
    }

    /// About 1.
    fn waver(&mut self, by: f64) -> f64 {
        self.between(1.0 - by, 1.0 + by)
    }
}

/// A set of pages that is written to at random, at this rate per second.
#[derive(Clone, Copy, Debug)]
struct Set {
    pages: f64,
    rate: f64,
}

#[derive(Clone, Debug)]
struct Model {
    seed: u64,
    pages: u64,
    /// The share of pages that are zero in the first pass.
    zero: f64,
    sets: [Set; 2],
    /// Bytes per second.
    bandwidth: f64,
    latency: f64,
    /// How much guest and link fluctuate.
    waver: f64,
    options: MigrateOptions,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let pages = random.decades(256e6, 64e9) / PAGE as f64;
        let bandwidth = random.decades(50e6, 5e9);
        // A guest that writes between a fiftieth and three times of what can be sent.
        let rate = bandwidth / PAGE as f64 * random.decades(0.02, 3.0);
        let hot = random.between(0.3, 0.95);
        let sets = [
            Set { pages: pages * random.decades(0.002, 0.2), rate: rate * hot },
            Set { pages: pages * 0.8, rate: rate * (1.0 - hot) },
        ];
        let limit = Duration::from_secs_f64(random.decades(0.05, 2.0));
        let mut options = MigrateOptions::new().downtime_limit(limit);
        let auto_converge = random.next() < 0.5;
        options = options.auto_converge(auto_converge).cpu_throttle_tailslow(random.next() < 0.5);
        if random.next() < 0.3 {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes")]
            let (most, raw) = ((bandwidth * 0.6) as u64, bandwidth as u64);
            options = options.max_bandwidth(Some(most)).avail_switchover_bandwidth(Some(raw));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages")]
        Self {
            seed,
            pages: pages as u64,
            zero: random.between(0.0, 0.9),
            sets,
            bandwidth,
            latency: random.decades(2e-4, 5e-3),
            waver: random.between(0.0, 0.15),
            options: options.max_passes(Some(MOST_PASSES)),
        }
    }

    /// The number of pages that the guest dirties while it runs for `ran` seconds.
    fn dirtied(&self, ran: f64, random: &mut Random) -> u64 {
        let set = |set: &Set| set.pages * -(-set.rate * ran / set.pages).exp_m1();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages")]
        {
            (self.sets.iter().map(set).sum::<f64>() * random.waver(self.waver)).round() as u64
        }
    }

    /// The duration of a pass in seconds, computed one batch or one hundredth at a time.
    fn pass(&self, (normal, zero): (u64, u64), clock: f64, limit: Option<u64>, random: &mut Random) -> f64 {
        let mut slices = limit.map(Slices::new);
        let batch = (normal / 100).max(128);
        let mut now = 0.0;
        let (mut left, mut zero_left) = (normal, zero);
        while left + zero_left > 0 {
            let (some, zeros) = (left.min(batch), zero_left.min(zero.div_ceil(100)));
            (left, zero_left) = (left - some, zero_left - zeros);
            let bytes = some * PAGE_COST + zeros * ZERO_ENTRY;
            // Checking zero pages is faster than sending pages, but it takes time.
            now += bytes as f64 / (self.bandwidth * random.waver(self.waver)) + (zeros * PAGE) as f64 / 1e10;
            if let Some(slices) = &mut slices {
                slices.spend(bytes);
                while let Some(wait) = slices.wait(Duration::from_secs_f64(clock + now)) {
                    now += wait.as_secs_f64();
                }
            }
        }
        now + self.latency
    }

    fn run(&self) -> Run {
        let mut random = Random(!self.seed);
        let mut converge = Converge::new(&self.options, PageSize::KIB_4, self.pages, 4);
        let mut run = Run::default();
        let mut throttle = Percent::NONE;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages")]
        let zeros = (self.pages as f64 * self.zero) as u64;
        let mut todo = (self.pages - zeros, zeros);
        loop {
            let seconds = self.pass(todo, run.time, self.options.max_bandwidth, &mut random);
            run.time += seconds;
            let dirty = self.dirtied(seconds * throttle.running(), &mut random);
            let (normal, zero) = todo;
            let round = Round {
                time: Duration::from_secs_f64(seconds),
                bytes: normal * PAGE_COST + zero * ZERO_ENTRY,
                normal,
                zero,
                dirty,
            };
            let judgement = converge.judge(&round, Duration::from_secs_f64(run.time));
            run.looks.push((run.time, judgement.clone()));
            todo = (dirty, 0);
            match judgement.step {
                Step::Pass(None) => {}
                Step::Pass(Some(percent)) => {
                    assert!(percent > throttle, "{self:?}");
                    throttle = percent;
                }
                Step::SwitchOver => {
                    let downtime = self.pass(todo, 0.0, None, &mut random);
                    run.time += downtime;
                    run.downtime = Some(downtime);
                    return run;
                }
                Step::GiveUp(bound) => {
                    assert_eq!(bound, Bound::Passes(MOST_PASSES), "{self:?}");
                    return run;
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Run {
    /// Seconds since the beginning.
    time: f64,
    /// When each pass was judged, and the result.
    looks: Vec<(f64, Judgement)>,
    /// The downtime in seconds; `None` if the guest was never stopped.
    downtime: Option<f64>,
}

impl Run {
    fn stall(&self) -> bool {
        self.looks.iter().any(|(_, judgement)| judgement.stall.is_some())
    }
}

/// The errors of estimates, as shares of the true value.
#[derive(Default)]
struct Errors(Vec<f64>);

impl Errors {
    fn note(&mut self, expected: f64, actual: f64, least: f64) {
        self.0.push((expected - actual).abs() / actual.max(least));
    }

    /// The given percentile of the errors.
    fn of(&mut self, percent: usize) -> f64 {
        self.0.sort_by(f64::total_cmp);
        self.0.get((self.0.len() - 1) * percent / 100).copied().expect("some")
    }

    /// Prints the errors and asserts that half of them are below `half` and nine of ten below `most`.
    fn assert_below(&mut self, what: &str, half: f64, most: f64) {
        let [met_half, met_most, nearly, all] = [50, 90, 99, 100].map(|percent| self.of(percent) * 100.0);
        println!(
            "{what}: {} estimates, off by no more than {met_half:.1} % (half of them), {met_most:.1} % (90 of 100), \
             {nearly:.1} % (99 of 100), {all:.1} % (all)",
            self.0.len()
        );
        assert!(met_half < half && met_most < most, "{what}: expected {half} % and {most} %");
    }
}

const RUNS: u64 = 4000;

#[test]
fn expected_downtime_and_remaining_time_are_near_what_comes_about() {
    let (mut downtimes, mut times, mut held_back) = (Errors::default(), Errors::default(), Errors::default());
    for model in (0..RUNS).map(Model::new) {
        let run = model.run();
        let Some(downtime) = run.downtime else { continue };
        let (_, last) = run.looks.last().expect("a pass");
        let expected = last.expected_downtime.as_secs_f64();
        downtimes.note(expected, downtime, 0.05);
        // A pass over many zero pages shows less than the bandwidth of the link, so the downtime may be shorter than
        // expected. It is longer only because the link fluctuates and has a latency, which the estimate does not
        // include.
        let longer = downtime - model.latency;
        assert!(longer <= expected * 1.25, "{downtime} s, expected {expected} s, seed {}", model.seed);
        for (at, judgement) in &run.looks {
            let Some(expected) = judgement.remaining_time else { continue };
            let errors = if model.options.auto_converge { &mut held_back } else { &mut times };
            errors.note(expected.as_secs_f64(), run.time - at, 0.2);
        }
    }
    downtimes.assert_below("expected downtime, at the switchover", 3.0, 15.0);
    times.assert_below("expected remaining time, after each pass", 6.0, 60.0);
    held_back.assert_below("expected remaining time with auto-converge, after each pass", 12.0, 65.0);
}

#[test]
fn stall_is_told_where_there_is_one_and_nowhere_else() {
    let (mut stalled, mut converged, mut missed, mut false_alarms) = (0, 0, 0, 0);
    for model in (0..RUNS).map(Model::new).filter(|model| !model.options.auto_converge) {
        let run = model.run();
        match (run.downtime, run.stall()) {
            (None, true) => stalled += 1,
            (None, false) => missed += 1,
            (Some(_), false) => converged += 1,
            (Some(_), true) => false_alarms += 1,
        }
    }
    println!(
        "{stalled} stalled and reported, {converged} converged, {missed} missed, {false_alarms} false alarms"
    );
    assert!(stalled > 200 && converged > 1000);
    // Guests at the edge, for which a fluctuation may decide either way.
    assert!(missed == 0 && false_alarms * 100 <= converged);
}

#[test]
fn what_a_stall_advises_helps() {
    let mut tried = 0;
    for model in (0..RUNS).map(Model::new).filter(|model| !model.options.auto_converge) {
        let run = model.run();
        let Some(stall) = run.looks.iter().find_map(|(_, judgement)| judgement.stall.as_ref()) else {
            continue;
        };
        if run.downtime.is_some() {
            continue;
        }
        for remedy in &stall.remedies {
            let mut better = model.clone();
            better.options = match remedy {
                Remedy::DowntimeLimit(limit) => better.options.downtime_limit(*limit),
                Remedy::AutoConverge => better.options.auto_converge(true),
                _ => continue,
            };
            tried += 1;
            assert!(better.run().downtime.is_some(), "{remedy} helps, seed {}: {stall}", model.seed);
        }
    }
    println!("{tried} remedies tried");
    assert!(tried > 500, "{tried}");
}

#[test]
fn auto_converge_lets_every_guest_converge() {
    let mut throttled = 0;
    for model in (0..RUNS).map(Model::new).filter(|model| model.options.auto_converge) {
        let run = model.run();
        assert!(run.downtime.is_some(), "{model:?}");
        throttled +=
            u32::from(run.looks.iter().any(|(_, judgement)| matches!(judgement.step, Step::Pass(Some(_)))));
    }
    println!("{throttled} guests throttled");
    assert!(throttled > 300, "{throttled}");
}
