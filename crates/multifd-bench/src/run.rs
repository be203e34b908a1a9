//! The rounds: all peers of a case in turns, so that a machine that becomes slower does so for all of them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use multifd_testkit::{certificates::write_both, qemu::Qemu};

use crate::{
    Result,
    cases::{self, Case, Place, Way, Who},
    engine::IntoFile,
    free,
    measure::{Measured, Samples},
    peer::{
        Peer, Setting,
        copy::Copy,
        demo::Demo,
        engine::{EngineDestination, EngineSource},
        file::{EngineCapture, EngineRestore, OurCapture, OurRestore, QemuCapture, QemuRestore},
        iperf::Iperf,
        pair::{Make, Pair, Source},
        qemu::{QemuDestination, QemuSource},
    },
    report,
};

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// How often each peer is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Mebibytes of RAM
    #[arg(long, default_value_t = 1024)]
    ram: u64,
    /// The folder for results
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// The program `multifd`
    #[arg(long, default_value = "target/release/multifd")]
    program: PathBuf,
    /// Only peers whose names hold one of these, like us,alone
    #[arg(long, value_delimiter = ',')]
    peer: Vec<String>,
    /// This program of another build, to measure the engine before a change and after it in one run
    #[arg(long)]
    other_build: Option<PathBuf>,
    /// Let memory be fetched from the host of a virtual machine within the rounds
    #[arg(long)]
    cold: bool,
    /// Only say which cases there are
    #[arg(long)]
    list: bool,
    /// Cases, or what their names begin with; all if there is none
    cases: Vec<String>,
}

pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let mut chosen = cases::all(args.ram << 20, args.cold);
    for name in &args.cases {
        if !chosen.iter().any(|case| case.name.starts_with(name.as_str())) {
            return Err(format!("no case {name}; --list names them").into());
        }
    }
    chosen.retain(|case| {
        args.cases.is_empty() || args.cases.iter().any(|name| case.name.starts_with(name.as_str()))
    });
    if args.list {
        chosen.iter().for_each(|case| println!("{:<16}{}", case.name, case.about));
        return Ok(());
    }
    fs::create_dir_all(&args.out)?;
    let tls = tempfile::tempdir()?;
    write_both(tls.path())?;
    let qemu = Qemu::v10_0();
    let means = Means { args, qemu, tls: tls.path(), this: std::env::current_exe()? };
    let mut all = Vec::new();
    for case in chosen {
        eprintln!("── {}: {}", case.name, case.about);
        all.push(means.measure(case)?);
        // Written after each case, so that an early end leaves the results so far.
        report::write(&args.out, &all, args.rounds)?;
    }
    println!("{}", report::markdown(&all, args.rounds));
    eprintln!("results.md, results.json and channels.svg are in {}", args.out.display());
    Ok(())
}

struct Means<'a> {
    args: &'a RunArgs,
    qemu: Option<Qemu>,
    tls: &'a Path,
    /// This program.
    this: PathBuf,
}

impl Means<'_> {
    fn measure(&self, case: Case) -> Result<Measured> {
        let folder = match case.way {
            Way::Sockets | Way::Capture(Place::Disk) | Way::Restore(Place::Disk) => {
                tempfile::tempdir_in(&self.args.out)?
            }
            Way::Capture(Place::Memory) | Way::Restore(Place::Memory) => tempfile::tempdir_in("/dev/shm")?,
        };
        let mut ready = Vec::new();
        let named = |who: &&Who| {
            let peer = &self.args.peer;
            peer.is_empty() || peer.iter().any(|name| who.label().contains(name.as_str()))
        };
        let other = case.peers.contains(&Who::Engine) && self.args.other_build.is_some();
        for who in case.peers.iter().chain(other.then_some(&Who::OtherBuild)).filter(named) {
            let made = self.enough_memory(&case).and_then(|()| self.make(&case, *who, folder.path()));
            ready.push((*who, made, Samples::default()));
        }
        for round in 0..case.rounds.unwrap_or(usize::MAX).min(self.args.rounds) {
            let mut turn: Vec<_> = ready.iter_mut().collect();
            // The order alternates, so that a peer does not always follow the same one.
            if round % 2 == 1 {
                turn.reverse();
            }
            for (who, peer, samples) in turn {
                let Ok(measured) = peer else { continue };
                match measured.round() {
                    Ok(sample) => {
                        eprintln!("   {}: {:.3} s", who.label(), sample.seconds);
                        samples.0.push(sample);
                    }
                    Err(error) => *peer = Err(error),
                }
            }
        }
        let peers = ready.into_iter().map(|(who, peer, samples)| {
            let told = peer.map(|_| samples).map_err(|error| {
                eprintln!("   {}: NOT MEASURED: {error}", who.label());
                error.to_string()
            });
            (who, told)
        });
        Ok(Measured { peers: peers.collect(), case })
    }

    /// Checks that there is enough memory: both ends are on this machine.
    fn enough_memory(&self, case: &Case) -> Result<()> {
        let available = free::available()?;
        let touched =
            if case.setting.contents == crate::contents::Contents::Untouched { 0 } else { case.setting.ram };
        let needed = 2 * touched + (1 << 30);
        if available < needed {
            return Err(
                format!("expected {} MiB of free memory, found {}", needed >> 20, available >> 20).into()
            );
        }
        Ok(())
    }

    fn qemu(&self) -> Result<Qemu> {
        Ok(self.qemu.clone().ok_or("no QEMU 10.0 (`cargo xtask qemu`)")?)
    }

    fn make<'a>(&'a self, case: &Case, who: Who, folder: &Path) -> Result<Box<dyn Peer + 'a>> {
        let (setting, tls) = (case.setting, self.tls);
        let program: &Path = match (who, &self.args.other_build) {
            (Who::OtherBuild, Some(program)) => program,
            _ => &self.this,
        };
        let ours: Make<'a> =
            Box::new(move || Ok(Box::new(EngineDestination::start(program, &setting, Some(tls))?)));
        let theirs = |qemu: Qemu| -> Make<'a> {
            Box::new(move || Ok(Box::new(QemuDestination::start(&qemu, &setting, Some(tls))?)))
        };
        let pair = |source: Box<dyn Source + 'a>, make| -> Box<dyn Peer + 'a> {
            Box::new(Pair { setting, source, make })
        };
        Ok(match (who, case.way) {
            (Who::Qemu, _) => {
                let qemu = self.qemu()?;
                pair(Box::new(QemuSource::new(&qemu, &setting, Some(tls))), theirs(qemu))
            }
            (Who::Engine | Who::OtherBuild, _) => {
                pair(Box::new(EngineSource::start(program, &setting, Some(tls), None)?), ours)
            }
            (Who::QemuToEngine, _) => {
                pair(Box::new(QemuSource::new(&self.qemu()?, &setting, Some(tls))), ours)
            }
            (Who::EngineToQemu, _) => {
                let qemu = self.qemu()?;
                let machine = captured(&qemu, &setting, folder)?;
                let source = EngineSource::start(program, &setting, Some(tls), Some(&machine))?;
                fs::remove_file(machine)?;
                pair(Box::new(source), theirs(qemu))
            }
            (Who::Raw | Who::Lent, _) => {
                let make: Make<'a> =
                    Box::new(move || Ok(Box::new(EngineDestination::start_raw(program, &setting)?)));
                pair(Box::new(EngineSource::start_raw(program, &setting, who == Who::Lent)?), make)
            }
            (Who::Copy, _) => Box::new(Copy::new(&setting)?),
            (Who::Iperf, _) => Box::new(Iperf::start(setting.channels, setting.ram)?),
            (Who::QemuFile | Who::QemuFileSynced | Who::QemuFileDirect, Way::Capture(_)) => {
                Box::new(QemuCapture::new(&self.qemu()?, &setting, folder, into_file(who)))
            }
            (Who::EngineFile | Who::EngineFileSynced | Who::EngineFileCached, Way::Capture(_)) => {
                Box::new(EngineCapture::new(program, &setting, folder, into_file(who))?)
            }
            (Who::EngineFile | Who::EngineFileSynced | Who::EngineFileCached, _) => {
                let path = captured(&self.qemu()?, &setting, folder)?;
                Box::new(EngineRestore { program: program.to_owned(), setting, path })
            }
            (Who::OurFile, Way::Capture(_)) => {
                Box::new(OurCapture::new(&self.qemu()?, &setting, folder, self.program()?))
            }
            (Who::OurFileUnix, Way::Capture(_)) => {
                let capture = OurCapture::new(&self.qemu()?, &setting, folder, self.program()?);
                Box::new(capture.over_unix(folder))
            }
            (Who::QemuFile | Who::QemuFileSynced | Who::QemuFileDirect, _) => {
                let qemu = self.qemu()?;
                let path = captured(&qemu, &setting, folder)?;
                Box::new(QemuRestore { qemu, setting, path })
            }
            (Who::OurFile | Who::OurFileUnix, _) => {
                let qemu = self.qemu()?;
                let path = captured(&qemu, &setting, folder)?;
                Box::new(OurRestore { qemu, setting, path, program: self.program()? })
            }
            (Who::Demo(rate), _) => {
                Box::new(Demo { program: self.program()?, setting, dirty_rate: rate * 1_000_000 })
            }
        })
    }

    fn program(&self) -> Result<PathBuf> {
        let program = &self.args.program;
        if program.exists() {
            Ok(program.clone())
        } else {
            Err(format!("no program {}", program.display()).into())
        }
    }
}

/// How this peer writes a file.
fn into_file(who: Who) -> IntoFile {
    let direct_io = matches!(who, Who::QemuFileDirect | Who::EngineFileSynced);
    let synced = direct_io || matches!(who, Who::QemuFileSynced | Who::EngineFileCached);
    IntoFile { direct_io, synced }
}

/// The machine of this setting in a mapped-ram file, written by QEMU.
fn captured(qemu: &Qemu, setting: &Setting, folder: &Path) -> Result<PathBuf> {
    let path = folder.join("machine");
    if !path.exists() {
        let plain = Setting { tls: false, ..*setting };
        let mut source = QemuSource::of_file(qemu, &plain);
        source.ready()?;
        source.go(&plain, &format!("file:{}", path.display()))?;
        source.sent()?;
    }
    Ok(path)
}
