//! QEMU's own post-copy, with a relay in front of the destination.

use std::{sync::Arc, time::Duration};

use multifd::postcopy::Latencies;
use multifd_testkit::{
    guest::Guest,
    qemu::{PATIENCE, Qemu},
};
use serde_json::{Value, json};

use super::{machine::Rewrites, sample::Sample};
use crate::{Result, requests::Relay};

/// Moves a guest.
pub(super) fn measure(Rewrites { memory, stride }: Rewrites, preempt: bool) -> Result<Sample> {
    let qemu = Qemu::v10_0().ok_or("this benchmark needs QEMU 10.0")?;
    let guest = Guest::new()
        .working_set(u32::try_from(memory << 8)?)
        .filled(64)
        .filled_checked(0)
        .stride(u32::try_from(stride)?);
    let vm = || qemu.vm().memory((memory + 64) << 20).guest(&guest);
    let mut source = vm().start()?;
    source.wait_round(2, PATIENCE)?;
    let mut to = vm().incoming().start()?;
    for vm in [&mut source, &mut to] {
        vm.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)])?;
    }
    to.set_capabilities(&[("postcopy-blocktime", true)])?;
    // Little is sent before the switch.
    source.set_parameters(json!({ "max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 0 }))?;
    let times = Arc::<Latencies>::default();
    let socket = format!("unix:{}", to.path("incoming").display());
    let relay = Relay::between(&to.migrate_incoming(&socket)?, &times, preempt)?;
    source.migrate(&relay.address)?;
    source.execute("migrate-start-postcopy", json!({}))?;
    let ended = source.wait_migration("completed", PATIENCE)?;
    let arrived = to.wait_migration("completed", PATIENCE)?;
    let (before, now) = (to.round()?.unwrap_or(0), to.serial()?.len());
    to.wait_round(before + 1, PATIENCE).map_err(|error| format!("after {now} lines: {error}"))?;
    relay.end()?;
    let millis = |value: &Value| Duration::from_millis(value.as_u64().unwrap_or_default());
    Ok(Sample {
        faults: ended["ram"]["postcopy-requests"].as_u64().unwrap_or_default(),
        p50: times.percentile(500).unwrap_or_default(),
        p99: times.percentile(990).unwrap_or_default(),
        blocked: millis(&arrived["postcopy-vcpu-blocktime"][0]),
        downtime: millis(&ended["downtime"]),
        total: millis(&ended["total-time"]),
        bytes: ended["ram"]["transferred"].as_u64().unwrap_or_default(),
    })
}
