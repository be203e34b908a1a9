//! How soon a guest runs that is restored out of a file, and how soon all of its RAM is there: QEMU itself, `multifd send`, and
//! `multifd send --postcopy-ram`, in turns.
//!
//! ```text
//! fill 1 GiB of a guest ─▶ QEMU migrates into `multifd receive` ─▶ file in /dev/shm
//! each way: a waiting QEMU ─ the command ─▶ first line on the serial line ─▶ all of RAM
//! ```
//!
//! The guest writes a line after each round over a few pages, which takes less than a millisecond.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use clap::Args;
use multifd_testkit::{
    guest::Guest,
    qemu::{PATIENCE, Qemu, Vm},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Result;

#[derive(Debug, Args)]
pub(crate) struct FirstInstructionArgs {
    /// The program to measure
    #[arg(long, default_value = "target/release/multifd")]
    program: PathBuf,
    /// RAM of the guest in MiB; can be repeated
    #[arg(long, default_values_t = [1100, 4096, 16384])]
    ram: Vec<u64>,
    /// How often each way is measured; the median is shown
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// How a guest is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    QemuFile,
    Send,
    Postcopy,
    Preempt,
    /// As `Preempt`, with the pages that the start before has needed.
    WorkingSet,
}

const WAYS: [(Way, &str); 5] = [
    (Way::QemuFile, "QEMU, mapped-ram and multifd"),
    (Way::Send, "multifd send"),
    (Way::Postcopy, "multifd send --postcopy-ram"),
    (Way::Preempt, "... --postcopy-preempt"),
    (Way::WorkingSet, "... and the working set"),
];

/// One restore.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    first: Duration,
    all: Duration,
    requests: u64,
    half: u64,
    most: u64,
}

/// Measures, and prints a table.
pub(crate) fn run(args: &FirstInstructionArgs) -> Result<()> {
    let qemu = Qemu::v10_0().ok_or("this benchmark needs QEMU 10.0")?;
    println!("| RAM | Way | First instruction | All of RAM | Requests | p50 | p99 |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for ram in &args.ram {
        let machine = Machine::capture(&qemu, *ram, &args.program)?;
        let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); WAYS.len()];
        for _ in 0..args.rounds {
            for ((way, _), all) in WAYS.iter().zip(&mut measured) {
                all.push(machine.restore(*way)?);
            }
        }
        for ((_, label), all) in WAYS.iter().zip(&measured) {
            let time = |of: fn(&Measured) -> Duration| median(all.iter().map(of).collect());
            let number = |of: fn(&Measured) -> u64| median(all.iter().map(of).collect());
            println!(
                "| {ram} MiB | {label} | {} ms | {} ms | {} | {} µs | {} µs |",
                time(|one| one.first).as_millis(),
                time(|one| one.all).as_millis(),
                number(|one| one.requests),
                number(|one| one.half),
                number(|one| one.most),
            );
        }
    }
    Ok(())
}

/// The middle one; the upper of two.
pub(crate) fn median<T: Ord + Copy + Default>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// A captured machine.
struct Machine {
    qemu: Qemu,
    ram: u64,
    program: PathBuf,
    folder: TempDir,
}

impl Machine {
    /// Boots a guest that fills a GiB, and captures it.
    fn capture(qemu: &Qemu, ram: u64, program: &Path) -> Result<Self> {
        let folder = tempfile::tempdir_in("/dev/shm")?;
        let machine = Self { qemu: qemu.clone(), ram, program: program.to_owned(), folder };
        let mut source = machine.vm().start()?;
        source.wait_round(2, Duration::from_secs(300))?;
        source.set_multifd_channels(4)?;
        source.set_parameters(json!({ "max-bandwidth": 0 }))?;
        let address = machine.address("receive");
        let mut receives = machine.multifd(&["receive", "--quiet"], [address.as_str(), &machine.file()])?;
        while !Path::new(address.trim_start_matches("unix:")).exists() {
            sleep(Duration::from_millis(10));
        }
        source.migrate(&address)?;
        source.wait_migration("completed", Duration::from_secs(300))?;
        ended(&mut receives)?;
        Ok(machine)
    }

    fn vm(&self) -> multifd_testkit::qemu::VmBuilder {
        // A GiB that is never looked at again, and sixteen pages that are written all the time.
        let guest = Guest::new().working_set(16).filled(1 << 18).zero_every(0).filled_checked(0);
        self.qemu.vm().memory(self.ram << 20).guest(&guest)
    }

    fn file(&self) -> String {
        self.folder.path().join("machine").display().to_string()
    }

    fn address(&self, name: &str) -> String {
        format!("unix:{}", self.folder.path().join(name).display())
    }

    fn multifd<'a>(&self, options: &[&str], rest: impl IntoIterator<Item = &'a str>) -> Result<Child> {
        let mut command = Command::new(&self.program);
        Ok(command.args(options).args(rest).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?)
    }

    fn restore(&self, way: Way) -> Result<Measured> {
        let mut vm = self.vm().incoming().start()?;
        let file = self.file();
        match way {
            Way::QemuFile => vm.set_capabilities(&[("mapped-ram", true)])?,
            Way::Send => {}
            Way::Postcopy => vm.set_capabilities(&[("postcopy-ram", true)])?,
            Way::Preempt | Way::WorkingSet => {
                vm.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", true)])?;
            }
        }
        if matches!(way, Way::QemuFile | Way::Send) {
            vm.set_multifd_channels(4)?;
        }
        if way == Way::QemuFile {
            let begun = Instant::now();
            vm.migrate_incoming(&format!("file:{file}"))?;
            let first = first_line(&mut vm, begun)?;
            vm.wait_migration("completed", PATIENCE)?;
            return Ok(Measured { first, all: begun.elapsed(), ..Measured::default() });
        }
        let address = vm.migrate_incoming(&self.address("send"))?;
        let options: &[&str] = match way {
            Way::QemuFile | Way::Send => &["send", "--json", "--multifd-channels", "4"],
            Way::Postcopy => &["send", "--json", "--postcopy-ram", "--no-working-set"],
            Way::Preempt => &["send", "--json", "--postcopy-ram", "--postcopy-preempt", "--no-working-set"],
            Way::WorkingSet => {
                &["send", "--json", "--postcopy-ram", "--postcopy-preempt", "--record-working-set"]
            }
        };
        let begun = Instant::now();
        let mut sends = self.multifd(options, [file.as_str(), &address])?;
        let first = first_line(&mut vm, begun)?;
        let report = ended(&mut sends)?;
        let all = begun.elapsed();
        let number = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap_or_default();
        Ok(Measured {
            first,
            all,
            requests: number("/ram/postcopy-requests"),
            half: number("/postcopy/request-p50"),
            most: number("/postcopy/request-p99"),
        })
    }
}

/// Waits until the guest has written a line on its serial line.
fn first_line(vm: &mut Vm, begun: Instant) -> Result<Duration> {
    let serial = vm.path("serial");
    while fs::metadata(&serial).map_or(0, |found| found.len()) == 0 {
        if begun.elapsed() > Duration::from_secs(120) {
            return Err("the guest has written nothing for two minutes".into());
        }
        sleep(Duration::from_micros(300));
    }
    Ok(begun.elapsed())
}

/// Waits for the program. Returns its report.
fn ended(child: &mut Child) -> Result<Value> {
    let mut report = String::new();
    if let Some(mut output) = child.stdout.take() {
        std::io::Read::read_to_string(&mut output, &mut report)?;
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("multifd ended with {status}").into());
    }
    Ok(serde_json::from_str(&report).unwrap_or(Value::Null))
}
