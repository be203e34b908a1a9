//! `cargo xtask soak`: migrations without end over real connections, with faults in most, for as long as told.
//!
//! What is done and how it is judged is the test `soak` of `qemu-stream`; this tells it how long and from which seed on. It runs
//! as tests do, with every check of the compiler's in it.

use crate::{
    Failure,
    step::{cargo, run, step},
};

/// How long, and from where.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    minutes: u64,
    seed: Option<u64>,
    migrations: Option<u64>,
}

impl Wanted {
    /// `[--minutes N] [--seed S] [--migrations N]`; `None` if `args` are something else.
    pub(crate) fn parse(args: &[String]) -> Option<Self> {
        let mut wanted = Self { minutes: MINUTES, seed: None, migrations: None };
        for pair in args.chunks(2) {
            let [flag, value] = pair else { return None };
            let value = value.parse().ok()?;
            match flag.as_str() {
                "--minutes" => wanted.minutes = value,
                "--seed" => wanted.seed = Some(value),
                "--migrations" => wanted.migrations = Some(value),
                _ => return None,
            }
        }
        Some(wanted)
    }
}

/// Soaks.
///
/// # Errors
/// If a migration ended as none may; the text on standard output names its seed.
pub(crate) fn soak(wanted: &Wanted) -> Result<(), Failure> {
    let mut command = cargo();
    command.args(["test", "-p", "qemu-stream", "--test", "soak", "--", "--nocapture"]);
    command.env("MULTIFD_SOAK_SECONDS", (wanted.minutes * 60).to_string());
    // One that is not to be repeated tries what no other has.
    let seed = wanted.seed.map_or_else(fresh_seed, Ok)?;
    command.env("MULTIFD_SOAK_SEED", seed.to_string());
    if let Some(migrations) = wanted.migrations {
        command.env("MULTIFD_SOAK_MIGRATIONS", migrations.to_string());
    }
    step(&format!("soak from seed {seed} on"), || run(&mut command))
}

fn fresh_seed() -> Result<u64, Failure> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(now.as_secs() * SEEDS_A_SECOND)
}

/// Unless told.
const MINUTES: u64 = 10;
/// More than the migrations of a second, so that no two runs share one.
const SEEDS_A_SECOND: u64 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &str) -> Option<Wanted> {
        Wanted::parse(&args.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_taken_in_any_order_and_others_refused() {
        let wanted = Wanted { minutes: 3, seed: Some(7), migrations: Some(1) };
        assert_eq!(parsed("--seed 7 --migrations 1 --minutes 3"), Some(wanted));
        assert_eq!(parsed(""), Some(Wanted { minutes: MINUTES, seed: None, migrations: None }));
        for refused in ["--minutes", "--minutes x", "--minutes -1", "--hours 1", "5"] {
            assert_eq!(parsed(refused), None, "{refused}");
        }
    }
}
