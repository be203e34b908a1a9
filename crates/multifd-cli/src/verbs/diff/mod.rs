//! `multifd diff`: what differs between two stored machines: blocks, pages, devices and their fields.
//!
//! Exit codes as `diff`: 0 equal, 1 different, 2 failed.

mod fields;
mod pages;

use std::collections::BTreeMap;

use indicatif::HumanCount;
use multifd::channel::Stop;
use qemu_stream::{
    format::DevicePart,
    state::{DeviceState, Devices, StateError},
};
use serde::Serialize;

use self::{fields::FieldDifference, pages::Comparison};
use super::find::threads;
use crate::{
    args::DiffArgs,
    interrupt,
    output::{
        outcome::Failure,
        outlet::{print_json, print_lines},
    },
    stored::{Open, Opened},
};

/// All differences.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Differences {
    equal: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    machine: Vec<Values>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    blocks: Vec<Block>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<Device>,
}

/// A property that differs; `null` where a machine does not have it.
#[derive(Serialize)]
struct Values {
    what: &'static str,
    a: Option<String>,
    b: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Block {
    name: String,
    /// Its length in each machine; `null` where it is missing.
    a: Option<u64>,
    b: Option<u64>,
    /// Pages that differ, of those that both have.
    pages: u64,
    /// The first runs of them.
    runs: Vec<Run>,
}

#[derive(Serialize)]
struct Run {
    offset: u64,
    length: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Device {
    name: String,
    instance_id: u32,
    /// Its version in each machine; `null` where it is missing.
    a: Option<u32>,
    b: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fields: Vec<FieldDifference>,
}

pub(crate) fn run(args: &DiffArgs) -> Result<(), Failure> {
    diff(args).map_err(Failure::in_comparison)?.then_some(()).ok_or(Failure::Different)
}

/// Whether the machines are equal.
fn diff(args: &DiffArgs) -> Result<bool, Failure> {
    let stop = Stop::new();
    interrupt::cancels(&stop)?;
    let open = Open::new(&stop).quiet(true).no_verify(args.no_verify);
    let (a, b) = (open.machine(&args.a)?, open.machine(&args.b)?);
    let mut found = Differences {
        machine: machine(&a, &b),
        blocks: blocks(args, &a, &b, &stop)?,
        devices: devices(a.devices(), b.devices())?,
        ..Differences::default()
    };
    found.equal = found.machine.is_empty() && found.blocks.is_empty() && found.devices.is_empty();
    if args.json {
        print_json(&found)?;
    } else {
        print_lines(&found.lines())?;
    }
    Ok(found.equal)
}

fn machine(a: &Opened, b: &Opened) -> Vec<Values> {
    let values = |of: &Opened| {
        let configuration = of.configuration();
        [
            ("machine type", configuration.map(|of| of.machine.to_string())),
            ("uuid", configuration.and_then(|of| of.uuid).map(|uuid| uuid.to_string())),
            ("page size", Some(of.blocks().page_size().bytes().to_string())),
        ]
    };
    let pairs = values(a).into_iter().zip(values(b));
    pairs.filter(|(a, b)| a != b).map(|((what, a), (_, b))| Values { what, a, b }).collect()
}

fn blocks(args: &DiffArgs, a: &Opened, b: &Opened, stop: &Stop) -> Result<Vec<Block>, Failure> {
    let mut lengths: BTreeMap<String, (Option<u64>, Option<u64>)> = BTreeMap::new();
    for entry in a.blocks().entries() {
        lengths.entry(entry.name.to_string()).or_default().0 = Some(entry.used_length);
    }
    for entry in b.blocks().entries() {
        lengths.entry(entry.name.to_string()).or_default().1 = Some(entry.used_length);
    }
    let unread = |error| args.a.unreadable(error);
    let compared = Comparison::of(a, b).map_err(unread)?.run(threads(args.threads), stop)?;
    let mut blocks = Vec::new();
    for (name, (a, b)) in lengths {
        let pages = compared.get(&name);
        let count = pages.map_or(0, |pages| pages.different.count());
        if count == 0 && a == b {
            continue;
        }
        let limit = if args.runs == 0 { usize::MAX } else { args.runs };
        let runs = pages.map(|pages| pages.runs().take(limit)).into_iter().flatten();
        let runs = runs.map(|(offset, length)| Run { offset, length }).collect();
        blocks.push(Block { name, a, b, pages: count, runs });
    }
    Ok(blocks)
}

fn devices(a: &DevicePart, b: &DevicePart) -> Result<Vec<Device>, Failure> {
    let described = |part| match Devices::of(part) {
        Ok(devices) => Ok(Some(devices)),
        Err(StateError::NotDescribed) => Ok(None),
        Err(error) => Err(error),
    };
    let (of_a, of_b) = (described(a)?, described(b)?);
    let (Some(of_a), Some(of_b)) = (&of_a, &of_b) else { return Ok(undescribed(a, b)) };
    let mut all: BTreeMap<(String, u32), (Option<DeviceState<'_>>, Option<DeviceState<'_>>)> =
        BTreeMap::new();
    for device in of_a.iter() {
        all.entry((device.name().to_string(), device.instance())).or_default().0 = Some(device);
    }
    for device in of_b.iter() {
        all.entry((device.name().to_string(), device.instance())).or_default().1 = Some(device);
    }
    let mut found = Vec::new();
    for ((name, instance_id), (a, b)) in all {
        let fields = match (&a, &b) {
            (Some(a), Some(b)) => fields::differences(a, b),
            _ => Vec::new(),
        };
        let (a, b) = (a.map(|device| device.version()), b.map(|device| device.version()));
        if a != b || !fields.is_empty() {
            found.push(Device { name, instance_id, a, b, fields });
        }
    }
    Ok(found)
}

/// Devices without a description can only be compared as a whole.
fn undescribed(a: &DevicePart, b: &DevicePart) -> Vec<Device> {
    if (a.early(), a.blob()) == (b.early(), b.blob()) {
        return Vec::new();
    }
    let fields = vec![FieldDifference::of_bytes("", a.blob(), b.blob())];
    vec![Device { name: "all devices".into(), instance_id: 0, a: None, b: None, fields }]
}

impl Differences {
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
        for Values { what, a, b } in &self.machine {
            lines.push(format!("{what}: {} → {}", or_none(a.clone()), or_none(b.clone())));
        }
        for block in &self.blocks {
            match (block.a, block.b) {
                (Some(_), None) => lines.push(format!("block {}: only in A", block.name)),
                (None, Some(_)) => lines.push(format!("block {}: only in B", block.name)),
                (a, b) if a != b => {
                    let length = |of: Option<u64>| of.map(|length| format!("{length:#x}"));
                    lines.push(format!(
                        "block {}: length {} → {}",
                        block.name,
                        or_none(length(a)),
                        or_none(length(b))
                    ));
                }
                _ => {}
            }
            if block.pages > 0 {
                lines.push(format!("block {}: {} pages differ", block.name, HumanCount(block.pages)));
                let shown = block
                    .runs
                    .iter()
                    .map(|run| format!("  {:#x} to {:#x}", run.offset, run.offset + (run.length - 1)));
                lines.extend(shown);
            }
        }
        for device in &self.devices {
            let name = format!("device {}:{}", device.name, device.instance_id);
            match (device.a, device.b) {
                (Some(_), None) => lines.push(format!("{name}: only in A")),
                (None, Some(_)) => lines.push(format!("{name}: only in B")),
                (Some(a), Some(b)) if a != b => lines.push(format!("{name}: version {a} → {b}")),
                _ => lines.push(name),
            }
            for FieldDifference { path, a, b } in &device.fields {
                lines.push(format!("  {path}: {a} → {b}"));
            }
        }
        lines
    }
}
