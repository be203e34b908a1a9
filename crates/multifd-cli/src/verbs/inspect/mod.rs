//! `multifd inspect`: shows the contents of a mapped-ram file without its pages, or extracts one block's pages.

mod chain;
pub(in crate::verbs) mod device;
mod recording;

use indicatif::BinaryBytes;
use multifd::channel::Stop;
use qemu_stream::{
    format::SyncMode,
    stored::{LibvirtImage, Pages},
};
use serde::Serialize;

use super::extract;
use crate::{
    about::{About, restore},
    args::InspectArgs,
    output::{
        outcome::Failure,
        outlet::{print_json, print_lines},
    },
    stored::{Form, Open, Opened},
};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Contents {
    /// How the machine is stored.
    form: String,
    /// Whether pages have places in the file.
    #[serde(skip)]
    in_place: bool,
    /// Whether people want to see the form.
    #[serde(skip)]
    named: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    libvirt: Option<Libvirt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    page_size: usize,
    footers: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    sync_mode: Option<&'static str>,
    switchover_start: bool,
    described: bool,
    /// The description is not the source's.
    split_by_footers: bool,
    blocks: Vec<Block>,
    devices: Vec<Device>,
    total: u64,
    present: u64,
    /// Bytes that the file occupies on the disk, of all that is in it.
    on_disk: u64,
    digests: bool,
    /// What identifies the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    root: Option<String>,
    /// The files of a delta and its bases, newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    chain: Vec<chain::Link>,
    about: About,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    restore: Vec<String>,
    trailing_bytes: u64,
}

/// What the head of a libvirt image says.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Libvirt {
    version: u32,
    was_running: bool,
    stream_at: u64,
    xml: String,
}

impl Libvirt {
    fn of(form: &Form) -> Option<Self> {
        let Form::Libvirt(image) = form else { return None };
        let LibvirtImage { version, was_running, stream_at, xml, .. } = image.clone();
        Some(Self { version, was_running, stream_at, xml })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Block {
    name: String,
    used_length: u64,
    pages: u64,
    pages_present: u64,
    /// Where its pages are in the file, if they have places there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pages_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<u64>,
    ignored: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Device {
    name: String,
    instance_id: u32,
    version: u32,
    size: usize,
    early: bool,
}

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    // What passed is shown of a recording, unless something of the machine is asked for.
    let of_the_machine = args.devices || args.device.is_some() || args.xml || args.extract.is_some();
    if !of_the_machine && recording::is_one(args) {
        return recording::run(args);
    }
    if args.svg.is_some() {
        return Err(args.file.unreadable("--svg needs a recording, which multifd record has written").into());
    }
    if args.force && args.extract.is_none() {
        return Err(Failure::Usage("--force needs --extract or --svg".into()));
    }
    let stop = Stop::new();
    let pages = if args.extract.is_some() { Pages::Keep } else { Pages::Count };
    let file = Open::new(&stop).quiet(true).no_verify(args.no_verify).pages(pages).machine(&args.file)?;
    if let (Some(block), Some(out)) = (&args.extract, &args.out) {
        return extract::run(&args.file, &file, block, out, args.force);
    }
    if args.devices || args.device.is_some() {
        return device::run(args, &file);
    }
    if args.xml {
        return xml(args, &file);
    }
    let mut contents = contents(&file).map_err(|error| args.file.unreadable(error))?;
    contents.restore = restore::commands(&args.file, &contents.about);
    if args.json {
        print_json(&contents)?;
    } else {
        print_lines(&contents.table())?;
    }
    Ok(())
}

/// Prints the definition of the guest in a libvirt image, as it is.
fn xml(args: &InspectArgs, file: &Opened) -> Result<(), Failure> {
    let Form::Libvirt(image) = file.form() else {
        let why = format!("it is {}, and only a save image of libvirt has an XML", file.form());
        return Err(args.file.unreadable(why).into());
    };
    Ok(print_lines(&image.xml.lines().collect::<Vec<_>>())?)
}

fn contents(file: &Opened) -> Result<Contents, qemu_stream::Error> {
    let configuration = file.configuration();
    let mut blocks = Vec::new();
    let newest = file.newest();
    for ((index, entry), place) in file.blocks().iter().zip(newest.places()) {
        let present = file.bitmap(index)?.count();
        blocks.push(Block {
            name: entry.name.to_string(),
            used_length: entry.used_length,
            pages: place.pages(),
            pages_present: present,
            pages_offset: file.form().is_in_place().then_some(place.pages_offset),
            address: entry.address,
            ignored: place.is_ignored(),
        });
    }
    let page_size = file.blocks().page_size().bytes();
    let devices = file.devices().sections().iter().map(|device| Device {
        name: device.name.to_string(),
        instance_id: device.instance,
        version: device.version,
        size: device.body.len(),
        early: device.early,
    });
    let live = file.devices().live().iter().map(|live| Device {
        name: live.name.to_string(),
        instance_id: live.instance,
        version: live.version,
        size: usize::try_from(live.size).unwrap_or(usize::MAX),
        early: true,
    });
    Ok(Contents {
        machine: configuration.map(|configuration| configuration.machine.to_string()),
        uuid: configuration.and_then(|configuration| configuration.uuid).map(|uuid| uuid.to_string()),
        page_size,
        footers: file.devices().has_footers(),
        sync_mode: file.sync_mode().map(|mode| match mode {
            SyncMode::Legacy => "legacy",
            SyncMode::Round => "round",
        }),
        switchover_start: file.switchover_start(),
        described: file.devices().description().is_some(),
        split_by_footers: file.devices().is_split_by_footers(),
        trailing_bytes: newest.trailing_bytes(),
        on_disk: file.on_disk(),
        form: file.form().to_string(),
        in_place: file.form().is_in_place(),
        named: *file.form() != Form::MappedRam,
        libvirt: Libvirt::of(file.form()),
        digests: file.has_digests(),
        root: file.root().map(|root| root.to_string()),
        chain: chain::of(file)?,
        about: About::of(file),
        restore: Vec::new(),
        total: file.blocks().total(),
        present: blocks.iter().map(|block| block.pages_present * page_size as u64).sum(),
        blocks,
        devices: devices.chain(live).collect(),
    })
}

impl Contents {
    fn table(&self) -> Vec<String> {
        let machine = self.machine.as_deref().unwrap_or("not in the file (machine type up to 2.3)");
        let mut lines = Vec::new();
        if self.named {
            lines.push(format!("form       {}", self.form));
        }
        lines.push(format!("machine    {machine}"));
        lines.extend(self.libvirt.as_ref().map(|image| {
            let state = if image.was_running { "ran" } else { "was paused" };
            format!(
                "libvirt    image version {}, the guest {state}; --xml prints its definition",
                image.version
            )
        }));
        lines.extend(self.uuid.iter().map(|uuid| format!("uuid       {uuid}")));
        lines.push(format!("page size  {}", BinaryBytes(self.page_size as u64)));
        lines.push(format!(
            "RAM        {} in {} blocks, {} present",
            BinaryBytes(self.total),
            self.blocks.len(),
            BinaryBytes(self.present)
        ));
        lines.push(format!("on disk    {}", BinaryBytes(self.on_disk)));
        lines.extend(self.sync_mode.map(|mode| format!("sync mode  {mode}")));
        lines.push(match self.digests {
            false if !self.in_place => {
                "digests    none; multifd merge FILE NEW makes a file that has them".to_owned()
            }
            true => "digests    of every page; multifd verify compares them".to_owned(),
            false => "digests    none, so damage is not noticed; multifd verify --add adds them".to_owned(),
        });
        lines.extend(self.about.lines());
        lines.extend(chain::lines(&self.chain));
        lines.push(String::new());
        lines.push(format!("{:<40} {:>14} {:>10} {:>10}", "block", "used length", "pages", "present"));
        lines.extend(self.blocks.iter().map(|block| {
            let length = format!("{:#x}", block.used_length);
            let present = block.pages_present.to_string();
            let present = if block.ignored { "shared" } else { &present };
            format!("{:<40} {length:>14} {:>10} {present:>10}", block.name, block.pages)
        }));
        lines.push(String::new());
        lines.push(format!("{:<40} {:>14} {:>10} {:>10}", "device", "instance", "version", "bytes"));
        if self.split_by_footers {
            lines.push(
                "(the source has not described its devices (post-copy): they are split at the ends of their sections)"
                    .to_owned(),
            );
        }
        if !self.described {
            lines.push(
                "(no description: machine option suppress-vmdesc, or a machine type up to 2.2)".to_owned(),
            );
        }
        lines.extend(self.devices.iter().map(|device| {
            let instance = format!("{:#x}", device.instance_id);
            format!("{:<40} {instance:>14} {:>10} {:>10}", device.name, device.version, device.size)
        }));
        lines.push(String::new());
        lines.push("to restore it:".to_owned());
        lines.extend(self.restore.iter().map(|command| format!("  {command}")));
        if self.trailing_bytes > 0 {
            lines.push(String::new());
            lines.push(format!(
                "WARNING: {} bytes after the end of the machine are ignored, as QEMU does",
                self.trailing_bytes
            ));
        }
        lines
    }
}
