//! The line: the loopback device of a network namespace, with a limit.

use std::{env, process::Command};

use crate::Result;

/// Runs this program again, in a network namespace of its own.
pub(super) fn enter(rate: &str) -> Result<()> {
    let mut again = Command::new("unshare");
    again.arg("--net").arg(env::current_exe()?).args(env::args_os().skip(1)).arg("--inside");
    let status = again.status().map_err(|error| format!("cannot run unshare (util-linux): {error}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("the benchmark over a line of {rate} ended with {status}; it needs root for the namespace")
        .into())
}

/// Limits the loopback device of this namespace.
pub(super) fn limit(rate: &str) -> Result<()> {
    call("ip", &["link", "set", "lo", "mtu", "9000", "up"])?;
    call("tc", &["qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "128k", "limit", "1m"])
}

fn call(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program).args(args).status();
    let status = status.map_err(|error| format!("cannot run {program} (iproute2): {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{program} {}: {status}", args.join(" ")).into()) }
}
