//! `multifd inspect`: what a mapped-ram file holds, without its pages, or one block's pages alone.

use indicatif::BinaryBytes;
use qemu_stream::mapped_ram::MappedRamFile;
use serde::Serialize;

use crate::{
    args::InspectArgs,
    extract,
    outcome::{Failure, print},
};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Contents {
    machine: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    page_size: usize,
    blocks: Vec<Block>,
    devices: Vec<Device>,
    total: u64,
    present: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Block {
    name: String,
    used_length: u64,
    pages: u64,
    pages_present: u64,
    pages_offset: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Device {
    name: String,
    instance_id: u32,
    version: u32,
    size: usize,
}

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let file = args.file.open()?;
    if let (Some(block), Some(out)) = (&args.extract, &args.out) {
        return extract::run(&args.file, &file, block, out, args.force);
    }
    let contents = contents(&file).map_err(|error| args.file.unreadable(error))?;
    if args.json {
        print(&serde_json::to_string(&contents)?)?;
    } else {
        print(&contents.table())?;
    }
    Ok(())
}

fn contents(file: &MappedRamFile) -> Result<Contents, qemu_stream::Error> {
    let configuration = file.configuration();
    let mut blocks = Vec::new();
    for ((index, entry), place) in file.blocks().iter().zip(file.places()) {
        let present = file.bitmap(index)?.iter().map(|word| u64::from(word.count_ones())).sum();
        blocks.push(Block {
            name: entry.name.to_string(),
            used_length: entry.used_length,
            pages: place.pages(),
            pages_present: present,
            pages_offset: place.pages_offset,
        });
    }
    let page_size = configuration.page_size().bytes();
    let devices = file.devices().sections().iter().map(|device| Device {
        name: device.name.to_string(),
        instance_id: device.instance,
        version: device.version,
        size: device.body.len(),
    });
    Ok(Contents {
        machine: configuration.machine.to_string(),
        uuid: configuration.uuid.map(|uuid| uuid.to_string()),
        page_size,
        total: file.blocks().total(),
        present: blocks.iter().map(|block| block.pages_present * page_size as u64).sum(),
        blocks,
        devices: devices.collect(),
    })
}

impl Contents {
    fn table(&self) -> String {
        let mut lines = vec![format!("machine    {}", self.machine)];
        lines.extend(self.uuid.iter().map(|uuid| format!("uuid       {uuid}")));
        lines.push(format!("page size  {}", BinaryBytes(self.page_size as u64)));
        lines.push(format!(
            "RAM        {} in {} blocks, {} present",
            BinaryBytes(self.total),
            self.blocks.len(),
            BinaryBytes(self.present)
        ));
        lines.push(format!("\n{:<40} {:>14} {:>10} {:>10}", "block", "used length", "pages", "present"));
        lines.extend(self.blocks.iter().map(|block| {
            let length = format!("{:#x}", block.used_length);
            format!("{:<40} {length:>14} {:>10} {:>10}", block.name, block.pages, block.pages_present)
        }));
        lines.push(format!("\n{:<40} {:>14} {:>10} {:>10}", "device", "instance", "version", "bytes"));
        lines.extend(self.devices.iter().map(|device| {
            let instance = format!("{:#x}", device.instance_id);
            format!("{:<40} {instance:>14} {:>10} {:>10}", device.name, device.version, device.size)
        }));
        lines.join("\n")
    }
}
