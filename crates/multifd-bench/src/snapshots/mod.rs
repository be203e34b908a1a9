//! What a snapshot of a running machine costs: one run, one table, with the targets.
//!
//! ```text
//! memory ── guest that writes ── moment: pause, slow-down
//!    ├── lazy: first instruction, all of RAM        each gives rows ──▶ table
//!    ├── faults: time of a fault beside a bare loop
//!    ├── delta of 1 %
//!    └── handed over: downtime
//! ```
//!
//! A size for which this system lacks the memory, and huge pages that it cannot provide, have a row that says so.

mod args;
mod faults;
mod guest;
mod handed_over;
mod lazy;
mod memory;
mod moment;
mod table;

use crate::{
    Result,
    delta::{self, DeltaArgs},
};
use args::Part;
pub(crate) use args::SnapshotsArgs;
use table::{Row, Table};

/// Measures, and prints a table.
pub(crate) fn run(args: &SnapshotsArgs) -> Result<()> {
    let mut table = Table::new();
    let parts: [(Part, Measure); 5] = [
        (Part::Moment, moment::measure),
        (Part::Lazy, lazy::measure),
        (Part::Faults, faults::measure),
        (Part::Delta, one_percent),
        (Part::HandedOver, handed_over::measure),
    ];
    for (part, measure) in parts {
        if args.only.is_empty() || args.only.contains(&part) {
            measure(args, &mut table)?;
        }
    }
    table.end();
    Ok(())
}

type Measure = fn(&SnapshotsArgs, &mut Table) -> Result<()>;

/// A delta of 1 % changed pages beside a whole capture.
fn one_percent(args: &SnapshotsArgs, table: &mut Table) -> Result<()> {
    for (place, folder) in [("/dev/shm", &args.folder), ("the disk", &args.disk)] {
        let setting = format!("{} MiB, 1 % written, file in {place}", args.least() >> 20);
        let found = delta::measure(&DeltaArgs::of(args.least() >> 20, args.rounds, folder.clone()))?;
        let [whole, _, by_log, ..] = found[..] else { return Err("a delta has seven rows".into()) };
        let time = by_log.0.as_secs_f64() / whole.0.as_secs_f64().max(1e-9);
        let note = format!("{} against {}", table::time(by_log.0), table::time(whole.0));
        table.add(Row::new("delta, time of a whole capture", &setting).percent(time, 5.0).note(note));
        let bytes = by_log.1 as f64 / (whole.1 as f64).max(1.0);
        let note = format!("{} MiB against {} MiB", by_log.1 >> 20, whole.1 >> 20);
        table.add(Row::new("delta, bytes of a whole capture", &setting).percent(bytes, 5.0).note(note));
    }
    Ok(())
}
