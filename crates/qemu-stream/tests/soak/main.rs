//! Many different migrations, most of them with faults. Each ends with the complete guest at one side, and leaves
//! nothing in the process.
//!
//! ```text
//! seed ─▶ plan ─▶ guest ─▶ migrate: source ══ connections with faults ══ destination ─▶ checked
//! ```
//!
//! It is one test in a separate process, because it counts the threads and descriptors of the process. By default it
//! makes [`MIGRATIONS`] migrations from one seed on; `cargo xtask soak` runs for the given time.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use multifd::{
    Error, Method,
    channel::tls::{ClientCredentials, ServerCredentials},
    error::chain,
    live::Status,
};
use multifd_testkit::{certificates, in_use, in_use_after, number};

mod fault;
mod guest;
mod migrate;
mod plan;

use guest::{SoakGuest, difference};
use migrate::{Ends, HANG, Means};
use plan::{Fault, Plan, Side};

/// A correct end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// At the destination, whose memory equals the source's.
    Arrived,
    /// The guest continues on the source, which has reported the reason.
    Stayed,
    /// The connection broke at the moment of the destination's decision. The source does not know the result, reports
    /// that, and its guest stays stopped. No protocol of messages can exclude this.
    OwnerUnknown,
    /// A bit was changed, and the format has no way to detect it.
    Unnoticed,
}

/// The results of all faults of one kind.
#[derive(Default)]
struct Tally {
    verdicts: BTreeMap<Verdict, u32>,
    longest: Duration,
}

fn judge(plan: &Plan, ends: &Ends) -> Result<Verdict, String> {
    let Ends { source, destination, .. } = ends;
    let pages: u64 = plan.blocks.iter().sum();
    let struck = ends.took.is_some();
    match (&source.result, &destination.result) {
        (Ok(()), received) => {
            // If several connections are opened at once, the one to be refused may not have been among them.
            if plan.must_fail() && (struck || !matches!(plan.fault, Fault::Refused(_))) {
                return Err("completed, though it cannot be".into());
            }
            if source.status != Status::Completed || !source.guest.stopped || source.guest.resumed {
                return Err(format!("completed, but the source is {:?} and its guest runs", source.status));
            }
            if let Err(error) = received {
                if struck && plan.may_hear_wrong() {
                    return Ok(Verdict::Unnoticed);
                }
                return Err(format!("the guest is lost: the destination failed: {}", chain(error)));
            }
            if struck && plan.may_differ() {
                return Ok(Verdict::Unnoticed);
            }
            let blocks = destination.blocks.as_ref().ok_or("completed without blocks")?;
            if let Some(difference) = difference(plan.seed, &source.guest.blocks, blocks) {
                return Err(difference);
            }
            if destination.device.as_ref() != Some(&source.guest.device()) {
                return Err(format!("the device's state is {:?}", destination.device));
            }
            Ok(Verdict::Arrived)
        }
        (Err(error), received) => {
            if plan.must_arrive() {
                let there = received.as_ref().err().map(|error| chain(error).to_string());
                return Err(format!("failed without a cause: {}; destination: {there:?}", chain(error)));
            }
            if plan.needs_a_strike() && !struck {
                return Err(format!("failed before anything was done to it: {}", chain(error)));
            }
            tells(plan.source_tells(), error)?;
            let unknown = matches!(error.kind(), Error::OwnerUnknown(_));
            if unknown && !(plan.owner_may_be_unknown() && source.guest.stopped && !source.guest.resumed) {
                return Err(format!("not known who has the guest: {}", chain(error)));
            }
            if !unknown && source.guest.stopped != source.guest.resumed {
                return Err(format!("the guest is stopped at the source: {}", chain(error)));
            }
            let begun = matches!(source.status, Status::Failed | Status::Cancelled);
            if !begun && source.status != Status::None {
                return Err(format!("failed, but the source is {:?}", source.status));
            }
            if begun && source.dirty != pages {
                return Err(format!("{} of {pages} pages are dirty at the source", source.dirty));
            }
            let cancelled = matches!(plan.fault, Fault::Cancel(Side::Source, _));
            if error.is_cancelled() != cancelled {
                return Err(format!("not the first cause at the source: {}", chain(error)));
            }
            match received {
                Ok(()) if unknown => Ok(Verdict::OwnerUnknown),
                Ok(()) => Err(format!("the guest runs at both sides: {}", chain(error))),
                Err(error) => {
                    let cancelled =
                        ends.abandoned || matches!(plan.fault, Fault::Cancel(Side::Destination, _));
                    if error.is_cancelled() && !cancelled {
                        return Err(format!("not the first cause at the destination: {}", chain(error)));
                    }
                    tells(plan.destination_tells(), error)?;
                    Ok(if unknown { Verdict::OwnerUnknown } else { Verdict::Stayed })
                }
            }
        }
    }
}

/// Checks that an error contains the expected text.
fn tells(expected: Option<&str>, error: &Error) -> Result<(), String> {
    let told = chain(error).to_string();
    match expected {
        Some(expected) if !told.contains(expected) => Err(format!("expected {expected:?}, found {told}")),
        _ => Ok(()),
    }
}

/// What is left in the process after a migration.
fn left_behind(before: (usize, usize)) -> Option<String> {
    let now = in_use_after(before);
    (now != before).then(|| format!("threads and descriptors: {before:?} before, {now:?} afterwards"))
}

/// The threads of this process and their positions, for a migration that hangs.
fn standing() -> String {
    let mut text = String::new();
    for task in fs::read_dir("/proc/self/task").expect("the process's own").flatten() {
        let of = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let _ = writeln!(text, "{} in {} {}", of("comm").trim(), of("wchan").trim(), of("syscall").trim());
    }
    text
}

/// Migrates by `plan` and checks the result; returns the guest, if it can continue.
fn soak(
    plan: &Plan,
    means: &Means,
    guest: SoakGuest,
    tally: &mut BTreeMap<&str, Tally>,
) -> Result<SoakGuest, String> {
    let Some(ends) = migrate::migrate(plan, means, guest) else {
        let (standing, time) = (standing(), HANG.as_secs());
        panic!("seed {}: a side hangs for {time} s, or has panicked: {plan:?}\n{standing}", plan.seed);
    };
    let verdict = judge(plan, &ends)?;
    if ends.took.is_some_and(|took| verdict == Verdict::Stayed && took > SOON) {
        let error =
            |result: &multifd::Result<()>| result.as_ref().err().map(|error| chain(error).to_string());
        let (source, destination) = (error(&ends.source.result), error(&ends.destination.result));
        return Err(format!("{:?} from the fault to the end: {source:?}, {destination:?}", ends.took));
    }
    let tally = tally.entry(plan.fault.kind()).or_default();
    *tally.verdicts.entry(verdict).or_default() += 1;
    // A fault that only makes a migration slow does not end it.
    if verdict == Verdict::Stayed {
        tally.longest = tally.longest.max(ends.took.unwrap_or_default());
    }
    Ok(ends.source.guest)
}

#[test]
fn every_migration_ends_with_its_guest_whole_at_one_side() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates::write_both(folder.path()).expect("certificates");
    let client = ClientCredentials::load(folder.path(), "127.0.0.1").expect("the source's credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("the destination's credentials");
    let means = Means { client, server, folder };
    let (first, seconds) = (number("MULTIFD_SOAK_SEED").unwrap_or(1), number("MULTIFD_SOAK_SECONDS"));
    let most =
        number("MULTIFD_SOAK_MIGRATIONS").unwrap_or(if seconds.is_some() { u64::MAX } else { MIGRATIONS });
    let (start, mut said) = (Instant::now(), Instant::now());
    let (mut tally, mut wrong, mut migrations) = (BTreeMap::new(), Vec::new(), 0_u64);
    for seed in (first..).take(usize::try_from(most).unwrap_or(usize::MAX)) {
        if seconds.is_some_and(|seconds| start.elapsed().as_secs() >= seconds) {
            break;
        }
        let plan = Plan::new(seed);
        let before = in_use();
        let guest = SoakGuest::boot(&plan);
        let mut outcome = soak(&plan, &means, guest, &mut tally);
        migrations += 1;
        // After a failure, the guest can move to the next destination.
        if let (Ok(guest), 0) = (&outcome, seed % 2)
            && (guest.resumed || !guest.stopped)
        {
            let channels = if seed % 4 == 0 { plan.channels / 2 } else { plan.channels + 3 };
            // Main has no compression.
            let method = if channels == 0 { Method::None } else { plan.method };
            let again = Plan { fault: Fault::None, channels, method, ..plan.clone() };
            outcome = outcome.and_then(|guest| soak(&again, &means, guest, &mut tally));
            migrations += 1;
        }
        let outcome = outcome.map(drop);
        if let Some(text) = outcome.err().or_else(|| left_behind(before)) {
            println!("WRONG: seed {seed}: {text}\n  {plan:?}");
            wrong.push(seed);
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            println!("{migrations} migrations in {} s, {} wrong", start.elapsed().as_secs(), wrong.len());
        }
    }
    println!("{migrations} migrations from seed {first} on in {} s", start.elapsed().as_secs());
    println!("{:<28} {:>7} {:>7} {:>7} {:>9}  longest", "fault", "arrived", "stayed", "unknown", "unnoticed");
    for (kind, tally) in &tally {
        let of = |verdict| tally.verdicts.get(&verdict).copied().unwrap_or_default();
        let (arrived, stayed) = (of(Verdict::Arrived), of(Verdict::Stayed));
        let (unknown, unnoticed) = (of(Verdict::OwnerUnknown), of(Verdict::Unnoticed));
        println!("{kind:<28} {arrived:>7} {stayed:>7} {unknown:>7} {unnoticed:>9}  {:.2?}", tally.longest);
    }
    assert!(migrations > 0, "nothing was tried");
    assert!(
        wrong.is_empty(),
        "wrong: seeds {wrong:?}; each again: cargo xtask soak --migrations 1 --seed SEED"
    );
}

/// From a fault to the end of both sides, on a machine with other load: far below limits that must not have an effect,
/// and above those that may.
const SOON: Duration = Duration::from_secs(20);
/// The default number of migrations.
const MIGRATIONS: u64 = 64;
