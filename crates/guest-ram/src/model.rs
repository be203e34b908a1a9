//! What the package `guest-ram-models` runs under a model checker: the library's own code, under many schedules.

use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
};

pub use crate::fault::{copier_model as copier, pager_model as pager};

/// Runs `model` `times` times under schedules drawn from a fixed seed: half of them random, half with a few badly chosen
/// interruptions.
///
/// # Panics
/// With the first schedule under which `model` panics or its threads wait for each other.
pub fn explore(times: usize, model: fn()) {
    check(RandomScheduler::new_from_seed(SEED, times / 2), model);
    check(PctScheduler::new_from_seed(SEED, INTERRUPTIONS, times - times / 2), model);
}

fn check(scheduler: impl Scheduler + 'static, model: fn()) {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    // The warning is about atomics that are not sequentially consistent. Here they are counters, which order nothing.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(model);
}

const SEED: u64 = 0x6d75_6c74_6966_6400;
const INTERRUPTIONS: usize = 3;
