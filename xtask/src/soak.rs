//! `cargo xtask soak`: runs endless migrations over real connections, most of them with faults, for the given time.
//! With `--lives` it runs whole lives of machines, which migrate several times, are captured and restored. With
//! `--postcopy` it kills the source of guests of a real QEMU, which run while their memory arrives.
//!
//! The tests `soak` and `lives` of `qemu-stream`, and one of `multifd-cli`, do the work and judge it; this task sets their
//! duration and their first seed. They run as tests, with all checks of the compiler enabled.

use crate::{
    Failure, qemu,
    step::{cargo, run, step},
};

/// The kind, the duration and the seed of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    kind: Kind,
    /// `None` if a number of lives is given.
    minutes: Option<u64>,
    seed: Option<u64>,
    /// Migrations, lives or kills.
    count: Option<u64>,
    steps: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Migrations,
    Lives,
    Postcopy,
}

impl Wanted {
    /// Parses `[--minutes N] [--seed S] [--migrations N]`, `--lives [--minutes N | --lives-count N] [--steps N] [--seed S]`, or
    /// `--postcopy [--minutes N | --kills N] [--seed S]`; `None` if `args` are something else.
    pub(crate) fn parse(args: &[String]) -> Option<Self> {
        let (kinds, args): (Vec<_>, Vec<_>) =
            args.iter().partition(|arg| matches!(arg.as_str(), "--lives" | "--postcopy"));
        let kind = match kinds[..] {
            [] => Kind::Migrations,
            [kind] if kind == "--lives" => Kind::Lives,
            [_] => Kind::Postcopy,
            _ => return None,
        };
        let mut wanted = Self { kind, minutes: None, seed: None, count: None, steps: None };
        for pair in args.chunks(2) {
            let [flag, value] = pair else { return None };
            let value = value.parse().ok()?;
            match (flag.as_str(), kind) {
                ("--minutes", _) => wanted.minutes = Some(value),
                ("--seed", _) => wanted.seed = Some(value),
                ("--migrations", Kind::Migrations)
                | ("--lives-count", Kind::Lives)
                | ("--kills", Kind::Postcopy) => wanted.count = Some(value),
                ("--steps", Kind::Lives) => wanted.steps = Some(value),
                _ => return None,
            }
        }
        if kind != Kind::Migrations && wanted.count.is_some() && wanted.minutes.is_some() {
            return None;
        }
        if kind == Kind::Migrations || wanted.count.is_none() {
            wanted.minutes.get_or_insert(MINUTES);
        }
        Some(wanted)
    }
}

/// Runs the soak test.
///
/// # Errors
/// If a migration or a life ended in a way that is not allowed; the text on standard output contains its seed.
pub(crate) fn soak(wanted: &Wanted) -> Result<(), Failure> {
    let (name, variables, count) = match wanted.kind {
        Kind::Migrations => ("soak", "MULTIFD_SOAK", "MIGRATIONS"),
        Kind::Lives => ("lives", "MULTIFD_LIVES", "COUNT"),
        Kind::Postcopy => ("postcopy", "MULTIFD_POSTCOPY", "KILLS"),
    };
    let mut command = cargo();
    if wanted.kind == Kind::Postcopy {
        command.args([
            "test",
            "-p",
            "multifd-cli",
            "--test",
            "it",
            "--",
            "--nocapture",
            "--ignored",
            "--exact",
        ]);
        command.arg("interop::postcopy_soak::killed_sources_never_lose_a_guest");
        for release in &qemu::RELEASES {
            command.env(release.variable, qemu::locate(release)?);
        }
    } else {
        command.args(["test", "-p", "qemu-stream", "--test", name, "--", "--nocapture"]);
    }
    if let Some(minutes) = wanted.minutes {
        command.env(format!("{variables}_SECONDS"), (minutes * 60).to_string());
    }
    // A run without a given seed uses a new one.
    let seed = wanted.seed.map_or_else(fresh_seed, Ok)?;
    command.env(format!("{variables}_SEED"), seed.to_string());
    for (what, number) in [(count, wanted.count), ("STEPS", wanted.steps)] {
        if let Some(number) = number {
            command.env(format!("{variables}_{what}"), number.to_string());
        }
    }
    step(&format!("{name} from seed {seed} on"), || run(&mut command))
}

fn fresh_seed() -> Result<u64, Failure> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(now.as_secs() * SEEDS_A_SECOND)
}

/// The default duration.
const MINUTES: u64 = 10;
/// More than the migrations per second, so that no two runs share a seed.
const SEEDS_A_SECOND: u64 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &str) -> Option<Wanted> {
        Wanted::parse(&args.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_taken_in_any_order_and_others_refused() {
        let wanted = parsed("--seed 7 --migrations 1 --minutes 3");
        let migrations =
            Wanted { kind: Kind::Migrations, minutes: Some(3), seed: Some(7), count: Some(1), steps: None };
        assert_eq!(wanted, Some(migrations));
        let wanted = parsed("");
        let default =
            Wanted { kind: Kind::Migrations, minutes: Some(MINUTES), seed: None, count: None, steps: None };
        assert_eq!(wanted, Some(default));
        for refused in
            ["--minutes", "--minutes x", "--minutes -1", "--hours 1", "5", "--steps 3", "--lives-count 1"]
        {
            assert_eq!(parsed(refused), None, "{refused}");
        }
    }

    #[test]
    fn kills_are_asked_for_by_time_or_by_number() {
        let postcopy =
            |minutes, count| Some(Wanted { kind: Kind::Postcopy, minutes, seed: None, count, steps: None });
        assert_eq!(parsed("--postcopy"), postcopy(Some(MINUTES), None));
        assert_eq!(parsed("--postcopy --kills 200"), postcopy(None, Some(200)));
        for refused in
            ["--postcopy --lives", "--postcopy --steps 3", "--postcopy --kills 1 --minutes 1", "--kills 3"]
        {
            assert_eq!(parsed(refused), None, "{refused}");
        }
    }

    #[test]
    fn lives_are_asked_for_by_time_or_by_number_and_not_by_both() {
        let lives =
            |minutes, seed, count, steps| Some(Wanted { kind: Kind::Lives, minutes, seed, count, steps });
        assert_eq!(parsed("--lives"), lives(Some(MINUTES), None, None, None));
        assert_eq!(parsed("--minutes 3 --lives --seed 7"), lives(Some(3), Some(7), None, None));
        assert_eq!(
            parsed("--lives --lives-count 1 --steps 5 --seed 7"),
            lives(None, Some(7), Some(1), Some(5))
        );
        for refused in
            ["--lives --lives", "--lives 3", "--lives --migrations 1", "--lives --minutes 1 --lives-count 1"]
        {
            assert_eq!(parsed(refused), None, "{refused}");
        }
    }
}
