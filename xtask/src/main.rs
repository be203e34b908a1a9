//! The project's own tasks, run as `cargo xtask NAME`.
//!
//! ```text
//! check   format, lints, documentation, directions of dependencies, licences, cargo deny, advisories, file lengths,
//!         plain words
//! test    fetches the QEMUs the interop tests talk to, then runs the tests; with --all the slow ones too
//! qemu    only fetches the QEMUs and a kernel for their guests
//! fuzz    runs the fuzz targets for a while
//! soak    endless migrations, most of them with faults; with --lives, lives of machines
//! bench   measures the engine against QEMU and iperf3
//! sanitize
//!         runs the libraries' tests under sanitizers, Miri and valgrind
//! api     compares the public API of each library with its api.txt, or writes it there with --bless
//! dist    makes what is distributed: a static program, its manual, a Debian package, an archive with checksums; with
//!         --all for two architectures, with --try it installs, uses and removes the package in a folder of its own
//! publish-check
//!         packages the libraries and builds them from their packages
//! ```
//!
//! Each task is a sequence of named, timed steps. The first failure ends the task with a text that says what was
//! expected and what was found. Messages go to standard error, results to standard output.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program prints its results")]

mod advisories;
mod api;
mod apt;
mod arrows;
mod bench;
mod check;
mod deny;
mod deps;
mod dist;
mod fuzz;
mod kernel;
mod length;
mod licences;
mod modules;
mod publish;
mod qemu;
mod sanitize;
mod soak;
mod sources;
mod step;
mod test;
mod words;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// An error as one readable text.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    if let Some(code) = api::as_rustdoc() {
        return code;
    }
    let mut args = env::args().skip(1);
    let task = args.next();
    let rest: Vec<String> = args.collect();
    let outcome = match (task.as_deref(), rest.as_slice()) {
        (Some("check"), []) => check::run(),
        (Some("qemu"), []) => qemu::run().and_then(|()| {
            println!("kernel {}", kernel::Kernel::locate()?.image.display());
            Ok(())
        }),
        (Some("api"), []) => api::run_task(false),
        (Some("api"), [bless]) if bless == "--bless" => api::run_task(true),
        (Some("publish-check"), []) => step::step("packages", || publish::check(true)),
        (Some("dist"), flags) if flags.iter().all(|flag| flag == "--all" || flag == "--try") => {
            let has = |name| flags.iter().any(|flag| flag == name);
            dist::run_task(has("--all"), has("--try"))
        }
        (Some("test"), rest) => {
            let (slow, rest) = match rest {
                [all, rest @ ..] if all == "--all" => (true, rest),
                rest => (false, rest),
            };
            test::run(slow, rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest))
        }
        (Some("fuzz"), rest) => {
            let (seconds, named) = match rest {
                [flag, seconds, named @ ..] if flag == "--seconds" => (seconds.parse().ok(), named),
                named => (Some(SECONDS), named),
            };
            match seconds.filter(|_| named.iter().all(|name| !name.starts_with('-'))) {
                Some(seconds) => fuzz::run_targets(seconds, named),
                None => {
                    eprintln!("{USAGE}");
                    return ExitCode::from(2);
                }
            }
        }
        (Some("soak"), rest) => match soak::Wanted::parse(rest) {
            Some(wanted) => soak::soak(&wanted),
            None => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        },
        (Some("bench"), [micro, rest @ ..]) if micro == "--micro" => bench::run_micro(rest),
        (Some("bench"), rest) => bench::run(rest),
        (Some("sanitize"), named) if named.iter().all(|name| !name.starts_with('-')) => {
            sanitize::run_tools(named)
        }
        (Some("help" | "--help" | "-h"), _) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace this program was built from.
fn workspace_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Whether this runs in CI, where nothing may be skipped.
fn in_ci() -> bool {
    env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}

const USAGE: &str = "usage: cargo xtask <task>
  check           format, lints, documentation, public API, dependency rules, licences, advisories, file lengths,
                  plain words in texts
  api [--bless]   compare the libraries' public API with crates/*/api.txt; --bless updates these files
  dist [--all] [--try]
                  make what is distributed: a static program, manual pages, a Debian package, an archive; --all also for
                  the other one of x86-64 and aarch64; --try installs, uses and removes the package in an empty folder
  publish-check   package the libraries, and build each from its package
  test [--all] [-- ARGS]
                  fetch the QEMUs, then run the tests; --all also runs those marked slow; ARGS are passed to `cargo test`
  qemu            fetch the QEMUs for the interop tests into target/qemu, and a kernel of Linux into target/kernel
  fuzz [--seconds N] [TARGET]...
                  run all fuzz targets, or the named ones, for N seconds each (default 60)
  soak [--minutes N] [--seed S] [--migrations N]
                  random migrations, most of them with faults, for N minutes (default 10); --seed S --migrations 1 repeats one
  soak --lives [--minutes N | --lives-count N] [--steps N] [--seed S]
                  lives of machines that migrate, are captured and restored, with faults in most steps, for N minutes or
                  N lives, each of N steps (default 10); --seed S --lives-count 1 repeats one
  soak --postcopy [--minutes N | --kills N] [--seed S]
                  kill the source of guests of QEMU that run while their memory arrives, at random moments
  bench [--rounds N] [--ram MIB] [--list] [CASE]...
                  measure the engine against QEMU and iperf3, in turns; all cases, or the named ones
  bench first-instruction [--rounds N] [--ram MIB]...
                  measure how soon a guest runs that is restored out of a file, and how soon all of its RAM is there
  bench requests [--rounds N] [--background MIB]
                  measure how long a destination of post-copy waits for a page, from QEMU and from a file
  bench postcopy [--rounds N] [--rate RATE] [--memory MIB]
                  measure how long a guest waits that moves before its memory, over a line with this limit, beside QEMU
  bench delta [--rounds N] [--memory MIB] [--folder FOLDER]
                  measure captures that store only what changed
  bench snapshots [--rounds N] [--ram MIB]... [--only PART]...
                  measure what a snapshot of a running machine costs, with the targets
  bench look [--rounds N] [--memory MIB] [--folder FOLDER]
                  measure exporting and searching the memory of a stored guest, beside dd and volatility3
  bench --micro [NAME]
                  measure single parts of the engine
  sanitize [TOOL]...
                  run the libraries' tests under address, thread, miri or valgrind; by default under each that is available";

/// For each fuzz target.
const SECONDS: u32 = 60;
