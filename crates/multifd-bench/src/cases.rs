//! The cases to measure: what is moved, which peers take part, and the targets.

use crate::{contents::Contents, peer::Setting};

/// A peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// QEMU to QEMU.
    Qemu,
    /// The engine to the engine.
    Engine,
    /// The same, of another build.
    OtherBuild,
    QemuToEngine,
    EngineToQemu,
    Iperf,
    /// The same memory over the same sockets, and nothing else: the upper limit for the engine.
    Raw,
    /// Like `Raw`, with pages lent to the sockets instead of copied.
    Lent,
    /// No socket: one copy from memory to memory.
    Copy,
    /// QEMU alone, into a file or out of it.
    QemuFile,
    /// Like `QemuFile`, with the file on the disk at the end.
    QemuFileSynced,
    /// Like `QemuFile`, with direct I/O.
    QemuFileDirect,
    /// The engine's memory into a file, or out of it.
    EngineFile,
    /// Like `EngineFile`, with the file on the disk at the end; with direct I/O, which is the default then.
    EngineFileSynced,
    /// Like `EngineFileSynced`, through the page cache.
    EngineFileCached,
    /// QEMU into `multifd receive`, or `multifd send` into QEMU.
    OurFile,
    /// QEMU into `multifd receive` over a unix socket, which is the way of `multifd capture`.
    OurFileUnix,
    /// `multifd demo`, whose guest writes this many MB per second.
    Demo(u64),
}

impl Who {
    pub(crate) fn label(self) -> String {
        match self {
            Self::Qemu => "QEMU → QEMU".into(),
            Self::Engine => "us → us".into(),
            Self::OtherBuild => "us → us, other build".into(),
            Self::QemuToEngine => "QEMU → us".into(),
            Self::EngineToQemu => "us → QEMU".into(),
            Self::Iperf => "iperf3".into(),
            Self::Raw => "sockets alone".into(),
            Self::Lent => "sockets only, pages in place".into(),
            Self::Copy => "one copy in memory".into(),
            Self::QemuFile => "QEMU, file:".into(),
            Self::QemuFileSynced => "QEMU, file: and fsync".into(),
            Self::QemuFileDirect => "QEMU, file: by direct-io and fsync".into(),
            Self::EngineFile => "us, file:".into(),
            Self::EngineFileSynced => "us, file: and fsync".into(),
            Self::EngineFileCached => "us, file: through the cache and fsync".into(),
            Self::OurFile => "QEMU and multifd".into(),
            Self::OurFileUnix => "QEMU and multifd, unix socket".into(),
            Self::Demo(rate) => format!("demo, {rate} MB/s written"),
        }
    }
}

/// Where a case's file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the folder of the results.
    Disk,
    /// In `/dev/shm`.
    Memory,
}

/// What is done with the setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Sockets,
    Capture(Place),
    Restore(Place),
}

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) setting: Setting,
    pub(crate) way: Way,
    pub(crate) peers: &'static [Who],
    /// How many rounds at most.
    pub(crate) rounds: Option<usize>,
}

/// All cases, for a guest of `ram` bytes.
pub(crate) fn all(ram: u64, cold: bool) -> Vec<Case> {
    let plain = Setting { ram, contents: Contents::Nonzero, channels: 4, method: "none", tls: false, cold };
    let case =
        |name, about, setting, peers| Case { name, about, setting, way: Way::Sockets, peers, rounds: None };
    let mut cases = Vec::new();
    for (channels, name) in [(1, "none-1"), (2, "none-2"), (4, "none-4"), (8, "none-8")] {
        let setting = Setting { channels, ..plain };
        cases.push(case(name, "every page is noise", setting, CHANNEL_PEERS));
    }
    cases.push(case("limits", "every page is noise", plain, LIMITS));
    let of = |contents, factor| Setting { contents, ram: factor * ram, ..plain };
    cases.push(case(
        "zero",
        "RAM that was never written, eight times the size",
        of(Contents::Untouched, 8),
        BOTH,
    ));
    cases.push(case("zeroed", "every page was written, with zeros", of(Contents::Zeroed, 2), BOTH));
    cases.push(case("mixed", "2 MiB of noise, 2 MiB of zeros", of(Contents::Mixed, 1), SPARSE));
    cases.push(case("scattered", "every second page is zero", of(Contents::Scattered, 1), SPARSE));
    for (name, method) in [("zlib", "zlib"), ("zstd", "zstd")] {
        let setting = Setting { contents: Contents::Compressible, method, ..plain };
        cases.push(case(name, "a quarter of each page is noise; level 1", setting, BOTH));
    }
    cases.push(case("tls", "every page is noise", Setting { tls: true, ..plain }, BOTH));
    let captures = [("capture", Place::Disk, CAPTURE), ("capture-memory", Place::Memory, CAPTURE_MEMORY)];
    for (name, place, peers) in captures {
        let way = Way::Capture(place);
        cases.push(Case { way, ..case(name, "a guest into a mapped-ram file", plain, peers) });
    }
    for (name, place) in [("restore", Place::Disk), ("restore-memory", Place::Memory)] {
        let way = Way::Restore(place);
        cases.push(Case { way, ..case(name, "a guest out of a mapped-ram file", plain, RESTORE) });
    }
    for (name, gib) in [("memory-1", 1), ("memory-4", 4), ("memory-8", 8)] {
        let about = "memory used in addition to the guest's RAM; every page is noise";
        let setting = Setting { ram: gib << 30, ..plain };
        cases.push(Case { rounds: Some(2), ..case(name, about, setting, &[Who::Engine]) });
    }
    cases.push(case("demo", "a guest that writes during the migration", plain, DEMO));
    cases
}

const CHANNEL_PEERS: &[Who] =
    &[Who::Qemu, Who::Engine, Who::QemuToEngine, Who::EngineToQemu, Who::Iperf, Who::Raw];
const LIMITS: &[Who] = &[Who::Qemu, Who::Engine, Who::Raw, Who::Lent, Who::Copy];
const SPARSE: &[Who] = &[Who::Qemu, Who::Engine, Who::Raw];
const BOTH: &[Who] = &[Who::Qemu, Who::Engine];
const CAPTURE: &[Who] = &[
    Who::QemuFile,
    Who::EngineFile,
    Who::QemuFileSynced,
    Who::EngineFileSynced,
    Who::QemuFileDirect,
    Who::EngineFileCached,
    Who::OurFile,
    Who::OurFileUnix,
];
const CAPTURE_MEMORY: &[Who] = &[Who::QemuFile, Who::EngineFile, Who::OurFile, Who::OurFileUnix];
const RESTORE: &[Who] = &[Who::QemuFile, Who::EngineFile, Who::OurFile];
const DEMO: &[Who] = &[Who::Demo(50), Who::Demo(200), Who::Demo(800)];

/// What a target compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quantity {
    /// RAM per second; more is better.
    Speed,
    /// CPU seconds per GiB, both sides together; less is better.
    Cpu,
}

/// A target: the ratio of two medians of one run.
pub(crate) struct Target {
    pub(crate) case: &'static str,
    pub(crate) quantity: Quantity,
    pub(crate) ours: Who,
    pub(crate) against: Who,
    /// The least ratio for a speed; the greatest for a cost.
    pub(crate) bound: f64,
}

pub(crate) const TARGETS: &[Target] = &[
    speed("none-4", Who::Engine, Who::Qemu, 5.0),
    speed("none-4", Who::Engine, Who::Iperf, 1.1),
    speed("scattered", Who::Engine, Who::Qemu, 2.0),
    speed("zero", Who::Engine, Who::Qemu, 4.0),
    speed("zstd", Who::Engine, Who::Qemu, 1.5),
    speed("zlib", Who::Engine, Who::Qemu, 2.5),
    speed("tls", Who::Engine, Who::Qemu, 2.0),
    speed("capture", Who::EngineFileSynced, Who::QemuFileSynced, 1.2),
    speed("capture-memory", Who::EngineFile, Who::QemuFile, 1.2),
    speed("restore", Who::EngineFile, Who::QemuFile, 1.2),
    speed("restore-memory", Who::EngineFile, Who::QemuFile, 1.2),
    speed("none-4", Who::QemuToEngine, Who::Qemu, 1.2),
    speed("none-4", Who::EngineToQemu, Who::Qemu, 1.2),
    Target { quantity: Quantity::Cpu, ..speed("none-4", Who::Engine, Who::Qemu, 0.35) },
];

const fn speed(case: &'static str, ours: Who, against: Who, bound: f64) -> Target {
    Target { case, quantity: Quantity::Speed, ours, against, bound }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_names_a_case_and_peers_that_take_part_in_it() {
        let cases = all(1 << 30, false);
        for target in TARGETS {
            let case = cases.iter().find(|case| case.name == target.case).expect(target.case);
            assert!(
                case.peers.contains(&target.ours) && case.peers.contains(&target.against),
                "{}",
                case.name
            );
        }
    }
}
