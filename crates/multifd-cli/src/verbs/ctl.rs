//! `multifd ctl`: one command to a run, at the socket of its `--control`, by the client for QMP.

use std::path::Path;

use indicatif::BinaryBytes;
use multifd::channel::Stop;
use serde_json::{Map, Value, json};

use crate::{
    args::{CtlArgs, CtlCommand, LimitArg},
    output::{
        outcome::{Failure, While},
        outlet::{print_json, print_lines, shown},
        report::millis,
    },
    qmp::{Qmp, QmpAddress, QmpError},
};

pub(crate) fn run(args: &CtlArgs) -> Result<(), Failure> {
    let failed = |error| explained(&args.socket, error);
    let mut control = Qmp::open(&QmpAddress::Unix(args.socket.clone()), &Stop::new()).map_err(failed)?;
    let mut execute = |command, arguments| control.execute(command, arguments).map_err(failed);
    match &args.command {
        CtlCommand::Status { json } => {
            let report = execute("query-migrate", json!({}))?;
            if *json { print_json(&report)? } else { print_lines(&[status(&report)])? }
        }
        CtlCommand::Cancel => drop(execute("migrate_cancel", json!({}))?),
        CtlCommand::Set { limits } => drop(execute("migrate-set-parameters", parameters(limits))?),
    }
    Ok(())
}

/// The arguments of `migrate-set-parameters`.
fn parameters(limits: &[LimitArg]) -> Value {
    let pair = |limit: &LimitArg| match limit {
        LimitArg::MaxBandwidth(bytes) => ("max-bandwidth".to_owned(), json!(bytes)),
        LimitArg::MaxPostcopyBandwidth(bytes) => ("max-postcopy-bandwidth".to_owned(), json!(bytes)),
        LimitArg::DowntimeLimit(time) => ("downtime-limit".to_owned(), json!(millis(*time))),
    };
    Value::Object(limits.iter().map(pair).collect::<Map<_, _>>())
}

/// A report in one line: `active: pass 2, 13.72 MiB transferred, 27.00 MiB left of 40.51 MiB`.
fn status(report: &Value) -> String {
    let ram = |name: &str| report.get("ram").and_then(|ram| ram.get(name)).and_then(Value::as_u64);
    let status = report.get("status").and_then(Value::as_str).unwrap_or("unknown");
    let mut parts = Vec::new();
    parts.extend(ram("dirty-sync-count").filter(|pass| *pass > 0).map(|pass| format!("pass {pass}")));
    parts.extend(ram("transferred").map(|bytes| format!("{} transferred", BinaryBytes(bytes))));
    match (ram("remaining"), ram("total").filter(|bytes| *bytes > 0)) {
        (Some(left), Some(all)) => {
            parts.push(format!("{} left of {}", BinaryBytes(left), BinaryBytes(all)));
        }
        (None, Some(all)) => parts.push(format!("the guest has {}", BinaryBytes(all))),
        (_, None) => {}
    }
    format!("{status}: {}", parts.join(", "))
}

/// The errors of the client are about a QEMU.
fn explained(socket: &Path, error: QmpError) -> Failure {
    let socket = shown(socket);
    match error {
        QmpError::Connect(_, error) => While::new(
            format!("cannot connect to the control socket {socket}: check that a run with --control {socket} lasts"),
            error,
        )
        .into(),
        QmpError::Refused { command, reason } => {
            While::new(format!("the run at {socket} refused {command}"), reason.to_string()).into()
        }
        QmpError::Closed { .. } => {
            let why = "the run has ended, or another client was preferred: try again if the run lasts";
            While::new(format!("the connection to the control socket {socket} ended"), why).into()
        }
        QmpError::Busy(_) | QmpError::Silent { .. } => {
            let why = "the run does not answer: it is stopped (SIGSTOP), or it serves another client";
            While::new(format!("no reply from the control socket {socket}"), why).into()
        }
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_has_what_is_known() {
        let report = json!({ "status": "none", "ram": { "total": 0, "transferred": 0 } });
        assert_eq!(status(&report), "none: 0 B transferred");
        let ram = json!({ "total": 4096, "transferred": 512, "remaining": 1024, "dirty-sync-count": 2 });
        assert_eq!(
            status(&json!({ "status": "active", "ram": ram })),
            "active: pass 2, 512 B transferred, 1.00 KiB left of 4.00 KiB"
        );
    }
}
