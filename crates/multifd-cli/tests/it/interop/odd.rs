//! Sources that are old, or with unusual options: each goes into a file and on to a destination with the same options,
//! running or stopped.

use std::{
    fs::{self, File},
    path::Path,
    time::Duration,
};

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm, VmBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::{
    ALL_CHECKED, Program, assert_left, file_uri, first_difference, folder, machine, memory, migrate,
    migrate_live, multifd, path, run, runs_on, send, source, stored_block, stored_memory,
};

const LOCAL: &str = "tcp:127.0.0.1:0";
const OLD: &str = "pc-q35-7.2";
const NEW: &str = "pc-q35-10.0";
/// The last type without configuration and footers.
const OLDEST: &str = "pc-i440fx-2.3";
/// The last type that does not describe its devices either.
const SILENT: &str = "pc-i440fx-2.2";

/// A path between two machines.
struct Way<'a> {
    from: VmBuilder,
    to: VmBuilder,
    channels: u8,
    /// Capabilities of both sides.
    capabilities: &'a [(&'a str, bool)],
    return_path: bool,
    /// Options of `receive`.
    receive: &'a [&'a str],
}

impl Way<'_> {
    /// Between two machines of the same kind, over two channels, with a return path.
    fn new(both: VmBuilder) -> Self {
        Way { from: both.clone(), to: both, channels: 2, capabilities: &[], return_path: true, receive: &[] }
    }

    fn settle(&self, vm: &mut Vm) -> Result<(), Error> {
        vm.set_capabilities(self.capabilities)?;
        vm.set_multifd_channels(self.channels)
    }

    fn start_source(&self) -> Result<Vm, Error> {
        let mut from = source(self.from.clone())?;
        self.settle(&mut from)?;
        from.set_capabilities(&[("return-path", self.return_path)])?;
        Ok(from)
    }

    /// A running guest goes into `file`.
    fn captured(&self, file: &Path) -> Result<Vm, Error> {
        let mut from = self.start_source()?;
        let (receive, address) = Program::receive(self.receive, LOCAL, file);
        migrate_live(&mut from, &address, 3)?;
        receive.done();
        Ok(from)
    }

    /// A file goes on to a destination.
    fn restored(&self, file: &Path) -> Result<Vm, Error> {
        let mut to = self.to.clone().incoming().start()?;
        self.settle(&mut to)?;
        send(&["--multifd-channels", &self.channels.to_string()], file, &mut to, LOCAL)?;
        Ok(to)
    }

    /// A running guest moves and continues; returns the output of `inspect` for the file in between.
    fn moves(&self) -> Result<Value, Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let from = self.captured(&file)?;
        let mut to = self.restored(&file)?;
        runs_on(&from, &mut to)?;
        Ok(inspected(&file))
    }
}

fn inspected(file: &Path) -> Value {
    let ended = run([Path::new("inspect"), Path::new("--json"), file]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    // The table has the same source.
    assert_eq!(run([Path::new("inspect"), file]).code, Some(0));
    ended.json()
}

fn with_globals(qemu: &Qemu, machine_type: &str, properties: &[&str]) -> VmBuilder {
    properties.iter().fold(machine(qemu, machine_type), |vm, property| {
        vm.args(["-global", &format!("migration.{property}")])
    })
}

#[test]
fn machine_type_2_3_moves_over_channels() {
    let Some(qemu) = Qemu::v7_2() else { return };
    let told = Way::new(machine(&qemu, OLDEST)).moves().unwrap();
    assert_eq!(told.get("machine"), None, "{told}");
    assert_eq!((&told["footers"], &told["sync-mode"]), (&json!(false), &json!("legacy")), "{told}");
    assert!(told["devices"].as_array().is_some_and(|devices| devices.len() > 10), "{told}");
}

#[test]
fn machine_type_2_3_moves_with_multifd_off_and_without_return_path() {
    let Some(qemu) = Qemu::v7_2() else { return };
    let way = Way { channels: 0, return_path: false, ..Way::new(machine(&qemu, OLDEST)) };
    let told = way.moves().unwrap();
    assert_eq!(told.get("sync-mode"), None, "{told}");
}

#[test]
fn stopped_guest_of_machine_type_2_3_keeps_its_memory() {
    fn moves(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        // Such a machine's stream does not contain that the guest was stopped.
        let way = Way { to: machine(qemu, OLDEST).paused(), ..Way::new(machine(qemu, OLDEST)) };
        let mut from = way.start_source()?;
        from.stop()?;
        let before = memory(&mut from)?;
        let (receive, address) = Program::receive(&[], LOCAL, &file);
        migrate(&mut from, &address)?;
        receive.done();
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        let mut to = way.restored(&file)?;
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
        to.cont()?;
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v7_2() else { return };
    moves(&qemu).unwrap();
}

#[test]
fn machine_type_2_2_moves_if_it_is_told_that_no_description_comes() {
    let Some(qemu) = Qemu::v7_2() else { return };
    for channels in [0, 2] {
        let receive = &["--suppress-vmdesc"];
        let way = Way { channels, return_path: false, receive, ..Way::new(machine(&qemu, SILENT)) };
        let told = way.moves().unwrap();
        assert_eq!((&told["described"], &told["devices"]), (&json!(false), &json!([])), "{told}");
    }
}

#[test]
fn machine_type_2_2_that_describes_its_devices_moves_with_a_return_path() {
    let Some(qemu) = Qemu::v7_2() else { return };
    let told = Way::new(machine(&qemu, "pc-i440fx-2.2,suppress-vmdesc=off")).moves().unwrap();
    assert_eq!(told["described"], json!(true), "{told}");
}

/// Without a return path the guest has left its source for good, so this must be reported.
#[test]
fn machine_type_2_2_is_refused_unasked() {
    let Some(qemu) = Qemu::v7_2() else { return };
    let folder = folder();
    let way = Way { return_path: false, ..Way::new(machine(&qemu, SILENT)) };
    let mut from = way.start_source().unwrap();
    let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
    migrate(&mut from, &address).unwrap();
    receive.end().assert_failed(1, &["without a description that fits", "suppress-vmdesc"]);
    assert_left(&folder, &[]);
}

#[test]
fn devices_that_are_not_described_move_without_a_return_path() {
    for (qemu, machine_type) in [(Qemu::v7_2(), OLD), (Qemu::v10_0(), NEW)] {
        let Some(qemu) = qemu else { return };
        let both = machine(&qemu, &format!("{machine_type},suppress-vmdesc=on"));
        let told = Way { return_path: false, ..Way::new(both) }.moves().unwrap();
        assert_eq!((&told["described"], &told["footers"]), (&json!(false), &json!(true)), "{told}");
    }
}

#[test]
#[ignore = "slow: ten seconds of silence"]
fn devices_that_are_not_described_move_with_a_return_path_if_that_is_known() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let both = machine(&qemu, "pc-q35-10.0,suppress-vmdesc=on");
    let told = Way { receive: &["--suppress-vmdesc"], ..Way::new(both) }.moves().unwrap();
    assert_eq!(told["described"], json!(false), "{told}");
}

#[test]
#[ignore = "slow: ten seconds of silence"]
fn devices_that_are_not_described_are_refused_with_a_return_path() {
    fn refused(qemu: &Qemu, machine_type: &str) -> Result<(), Error> {
        let folder = folder();
        let mut from = Way::new(machine(qemu, machine_type)).start_source()?;
        let (receive, address) = Program::receive(&[], LOCAL, &path(&folder, "machine"));
        from.set_parameters(json!({ "max-bandwidth": 0 }))?;
        from.migrate(&address)?;
        receive.end_within(Duration::from_secs(30)).assert_failed(1, &["suppress-vmdesc", "return-path"]);
        assert_left(&folder, &[]);
        from.wait_migration("failed", PATIENCE)?;
        from.wait_run_state("running", PATIENCE)?;
        let at = from.round()?.unwrap_or_default();
        from.wait_round(at + 3, PATIENCE).map(drop)
    }
    let Some([old, new]) = Qemu::both() else { return };
    refused(&old, SILENT).unwrap();
    refused(&new, "pc-q35-10.0,suppress-vmdesc=on").unwrap();
}

/// How a QEMU of 9.0 or later, which has both such machine types and such files, loads our file.
#[test]
fn file_without_configuration_and_footers_is_loaded_by_10_0() {
    fn loads(old: &Qemu, new: &Qemu) -> Result<(), Error> {
        let properties = &["send-configuration=off", "send-section-footer=off"];
        let folder = folder();
        let file = path(&folder, "machine");
        let way = Way::new(with_globals(old, OLD, properties));
        let from = way.captured(&file)?;
        let mut to = with_globals(new, OLD, properties).incoming().start()?;
        to.set_capabilities(&[("mapped-ram", true)])?;
        to.migrate_incoming(&file_uri(&file))?;
        to.wait_migration("completed", PATIENCE)?;
        runs_on(&from, &mut to)
    }
    let Some([old, new]) = Qemu::both() else { return };
    loads(&old, &new).unwrap();
}

/// The properties of the migration that affect the wire, each set on both sides but not in between.
#[test]
fn properties_of_the_source_are_kept_for_the_destination() {
    fn moves(qemu: &Qemu, machine_type: &str, properties: &[&str], told: &[(&str, Value)]) {
        let found = Way::new(with_globals(qemu, machine_type, properties)).moves();
        let found = found.unwrap_or_else(|error| panic!("{properties:?} on {machine_type}: {error}"));
        for (key, value) in told {
            assert_eq!(&found[*key], value, "{properties:?} on {machine_type}: {found}");
        }
    }
    let Some([old, new]) = Qemu::both() else { return };
    let legacy = ("sync-mode", json!("legacy"));
    let round = ("sync-mode", json!("round"));
    moves(&old, OLD, &["send-configuration=off"], &[("machine", Value::Null), ("footers", json!(true))]);
    moves(&old, OLD, &["send-section-footer=off"], &[("footers", json!(false))]);
    moves(&new, NEW, &["send-section-footer=off"], &[("footers", json!(false))]);
    moves(&new, NEW, &["multifd-flush-after-each-section=on"], &[legacy]);
    moves(&new, OLD, &["multifd-flush-after-each-section=off"], &[round]);
    moves(&new, NEW, &["send-switchover-start=off"], &[("switchover-start", json!(false))]);
    moves(&new, OLD, &["send-switchover-start=on"], &[("switchover-start", json!(true))]);
    moves(&new, NEW, &["store-global-state=off"], &[]);
}

/// A machine type without a version has no default, so the file must contain the mode.
#[test]
fn machine_type_without_a_version_moves() {
    let Some([old, new]) = Qemu::both() else { return };
    for (qemu, mode) in [(old, "legacy"), (new, "round")] {
        let told = Way::new(machine(&qemu, "microvm")).moves().unwrap();
        assert_eq!(told["sync-mode"], json!(mode), "{told}");
    }
}

/// A machine whose RAM is in `blocks` parts: two nodes, a memory device, ROMs, video memory.
fn of_many_blocks(qemu: &Qemu, machine_type: &str, device_memory: &str) -> VmBuilder {
    let args = [
        "-m 40M,slots=2,maxmem=1G",
        "-object memory-backend-ram,id=node0,size=24M",
        "-object memory-backend-memfd,id=node1,size=16M",
        "-numa node,nodeid=0,memdev=node0",
        "-numa node,nodeid=1,memdev=node1",
        "-device pc-dimm,id=dimm0,memdev=plugged",
        "-device VGA,vgamem_mb=2",
        "-device virtio-net-pci,netdev=none",
        "-netdev hubport,id=none,hubid=0",
    ];
    let vm = machine(qemu, machine_type).args(["-object", device_memory]);
    vm.args(args.iter().flat_map(|arg| arg.split(' ')))
}

/// The address of the memory device's memory.
const PLUGGED: u64 = 4 << 30;
const PLUGGED_LENGTH: u64 = 128 << 20;

/// Every block is compared: at the source, in the file, at the destination.
fn many_blocks(qemu: &Qemu, machine_type: &str, live: bool) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    // The guest does not write there, so it is filled from a file.
    let contents = path(&folder, "contents");
    let pages = 0..PLUGGED_LENGTH / 4096;
    let plugged: Vec<u8> =
        pages.flat_map(|page| [if page % 5 == 0 { page } else { 0 }.to_be_bytes(); 512].concat()).collect();
    fs::write(&contents, &plugged).map_err(|cause| Error::System("write".into(), cause))?;
    let size = format!("size={PLUGGED_LENGTH}");
    let filled = format!("memory-backend-file,id=plugged,{size},mem-path={},share=off", contents.display());
    let fresh = format!("memory-backend-ram,id=plugged,{size}");
    let way = Way {
        to: of_many_blocks(qemu, machine_type, &fresh),
        ..Way::new(of_many_blocks(qemu, machine_type, &filled))
    };
    let mut from = way.start_source()?;
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let before = if live {
        migrate_live(&mut from, &address, 3)?;
        memory(&mut from)?
    } else {
        from.stop()?;
        let before = memory(&mut from)?;
        migrate(&mut from, &address)?;
        before
    };
    receive.done();
    let told = inspected(&file);
    let names: Vec<&str> = told["blocks"]
        .as_array()
        .expect("blocks")
        .iter()
        .filter_map(|block| block["name"].as_str())
        .collect();
    for name in ["node0", "node1", "plugged", "pc.bios", "pc.rom", "/rom@etc/acpi/tables"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(names.iter().any(|name| name.ends_with("vga.vram")), "{names:?}");
    let stored = [stored_block(&file, "node0"), stored_block(&file, "node1")].concat();
    assert_eq!(first_difference(&before, &stored), None, "page, source and file");
    assert_eq!(plugged, stored_block(&file, "plugged"));

    let mut to = way.to.clone();
    if live {
        to = to.paused();
    }
    let mut to = Way { to, ..way }.restored(&file)?;
    assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
    assert_eq!(to.pmemsave(PLUGGED, PLUGGED_LENGTH)?, plugged);
    to.cont()?;
    runs_on(&from, &mut to)
}

#[test]
fn every_block_of_a_running_guest_arrives_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    many_blocks(&qemu, OLD, true).unwrap();
}

#[test]
fn every_block_of_a_stopped_guest_arrives_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    many_blocks(&qemu, OLD, false).unwrap();
}

#[test]
fn every_block_of_a_running_guest_arrives_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    many_blocks(&qemu, NEW, true).unwrap();
}

#[test]
fn every_block_of_a_stopped_guest_arrives_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    many_blocks(&qemu, NEW, false).unwrap();
}

/// A machine whose memory can grow. From machine type 8.0 on, its device's state is sent before RAM.
fn growing(qemu: &Qemu, machine_type: &str, requested: &str) -> VmBuilder {
    machine(qemu, machine_type)
        .args(["-m", "40M,maxmem=1G", "-object", "memory-backend-ram,id=more,size=128M", "-device"])
        .arg(format!("virtio-mem-pci,id=grows,memdev=more,requested-size={requested}"))
}

fn memory_devices(vm: &mut Vm) -> Result<Value, Error> {
    vm.execute("query-memory-devices", json!({}))
}

fn grown(qemu: &Qemu, machine_type: &str, early: bool, loads: bool) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let way = Way { to: growing(qemu, machine_type, "0"), ..Way::new(growing(qemu, machine_type, "8M")) };
    let mut from = way.start_source()?;
    from.execute(
        "qom-set",
        json!({ "path": "/machine/peripheral/grows", "property": "requested-size", "value": 16 << 20 }),
    )?;
    let before = memory_devices(&mut from)?;
    assert_eq!(before[0]["data"]["requested-size"], json!(16 << 20), "{before}");
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    migrate_live(&mut from, &address, 3)?;
    receive.done();
    let told = inspected(&file);
    let sent_early = told["devices"][0]["name"].as_str().is_some_and(|name| name.ends_with("-early"));
    assert_eq!((sent_early, &told["devices"][0]["early"]), (early, &json!(early)), "{told}");
    let mut to = way.restored(&file)?;
    assert_eq!(memory_devices(&mut to)?, before);
    runs_on(&from, &mut to)?;
    if !loads {
        return Ok(());
    }
    let mut to = growing(qemu, machine_type, "0").incoming().start()?;
    to.set_capabilities(&[("mapped-ram", true)])?;
    to.migrate_incoming(&file_uri(&file))?;
    to.wait_migration("completed", PATIENCE)?;
    assert_eq!(memory_devices(&mut to)?, before);
    runs_on(&from, &mut to)
}

#[test]
fn device_that_is_sent_before_ram_arrives_and_is_loaded_by_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    grown(&qemu, NEW, true, true).unwrap();
}

#[test]
fn the_same_device_is_sent_behind_ram_by_older_machine_types() {
    for (qemu, loads) in [(Qemu::v7_2(), false), (Qemu::v10_0(), true)] {
        let Some(qemu) = qemu else { return };
        grown(&qemu, OLD, false, loads).unwrap();
    }
}

#[test]
fn file_of_10_0_with_an_early_device_is_sent() {
    fn sends(qemu: &Qemu) -> Result<(), Error> {
        let folder = folder();
        let file = path(&folder, "machine");
        let mut from = source(growing(qemu, NEW, "8M"))?;
        from.set_capabilities(&[("mapped-ram", true)])?;
        let before = memory_devices(&mut from)?;
        migrate_live(&mut from, &file_uri(&file), 3)?;
        assert_eq!(inspected(&file)["devices"][0]["early"], json!(true));
        let mut to = Way::new(growing(qemu, NEW, "0")).restored(&file)?;
        assert_eq!(memory_devices(&mut to)?, before);
        runs_on(&from, &mut to)
    }
    let Some(qemu) = Qemu::v10_0() else { return };
    sends(&qemu).unwrap();
}

/// A machine whose RAM is a file that outlives it.
fn on_shared_memory(qemu: &Qemu, machine_type: &str, at: &TempDir) -> VmBuilder {
    let ram = path(at, "ram");
    machine(qemu, &format!("{machine_type},memory-backend=shared"))
        .arg("-object")
        .arg(format!("memory-backend-file,id=shared,size=40M,mem-path={},share=on", ram.display()))
}

/// A folder in memory.
fn in_memory() -> TempDir {
    tempfile::Builder::new().prefix("multifd-it-").tempdir_in("/dev/shm").expect("a folder in memory")
}

const IGNORED: &[(&str, bool)] = &[("x-ignore-shared", true)];

fn shared_memory_stays(qemu: &Qemu, machine_type: &str, channels: u8, live: bool) -> Result<(), Error> {
    let (folder, shared) = (folder(), in_memory());
    let file = path(&folder, "machine");
    let both = on_shared_memory(qemu, machine_type, &shared);
    let way = Way { capabilities: IGNORED, channels, ..Way::new(both) };
    let mut from = way.start_source()?;
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    let before = if live {
        migrate(&mut from, &address)?;
        None
    } else {
        from.stop()?;
        let before = memory(&mut from)?;
        migrate(&mut from, &address)?;
        Some(before)
    };
    let said = receive.done().stderr;
    assert!(said.contains("WARNING: block \"shared\" is shared memory and is not in the file"), "{said}");
    let told = inspected(&file);
    for block in told["blocks"].as_array().expect("blocks") {
        assert_eq!(block["ignored"], json!(block["name"] == "shared"), "{told}");
        assert!(block["address"].is_u64(), "{told}");
        assert!(block["ignored"] == json!(false) || block["pages-present"] == json!(0), "{told}");
    }
    // None of 40 MiB of RAM is in the file, although its guest has filled 10 of them.
    let taken =
        std::os::unix::fs::MetadataExt::blocks(&File::open(&file).expect("there").metadata().expect("told"));
    assert!(taken * 512 < 4 << 20, "{taken} blocks");

    let mut to = way.restored(&file)?;
    if let Some(before) = before {
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
        to.cont()?;
    }
    runs_on(&from, &mut to)
}

#[test]
fn shared_memory_stays_where_it_is_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    shared_memory_stays(&qemu, OLD, 2, true).unwrap();
}

#[test]
fn shared_memory_stays_where_it_is_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    shared_memory_stays(&qemu, NEW, 2, true).unwrap();
}

#[test]
fn shared_memory_of_a_stopped_guest_stays_where_it_is() {
    let Some(qemu) = Qemu::v10_0() else { return };
    shared_memory_stays(&qemu, NEW, 2, false).unwrap();
}

#[test]
fn shared_memory_stays_where_it_is_with_multifd_off() {
    let Some(qemu) = Qemu::v10_0() else { return };
    shared_memory_stays(&qemu, NEW, 0, true).unwrap();
}

#[test]
fn x_ignore_shared_without_shared_memory_leaves_nothing_out() {
    for (qemu, machine_type) in [(Qemu::v7_2(), OLD), (Qemu::v10_0(), NEW)] {
        let Some(qemu) = qemu else { return };
        let way = Way { capabilities: IGNORED, ..Way::new(machine(&qemu, machine_type)) };
        let told = way.moves().unwrap();
        let ignored = |block: &Value| block["ignored"] == json!(true);
        assert!(!told["blocks"].as_array().expect("blocks").iter().any(ignored), "{told}");
    }
}

/// The destination compares the capabilities in the configuration with its own.
#[test]
fn destination_that_does_not_share_refuses() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (folder, shared) = (folder(), in_memory());
    let file = path(&folder, "machine");
    let both = on_shared_memory(&qemu, NEW, &shared);
    let way = Way { capabilities: IGNORED, ..Way::new(both.clone()) };
    let mut from = way.start_source().unwrap();
    let (receive, address) = Program::receive(&[], LOCAL, &file);
    migrate(&mut from, &address).unwrap();
    receive.done();
    let mut to = both.incoming().start().unwrap();
    to.set_multifd_channels(2).unwrap();
    let address = to.migrate_incoming(LOCAL).unwrap();
    let ended = Program::start(multifd(["send"]).arg(&file).arg(address)).end_within(Duration::from_secs(20));
    ended.assert_failed(1, &["its own log"]);
}

/// This test shows a property of the QEMU that is tested: if a later one saves such machines, the test fails.
#[test]
fn qemu_itself_cannot_keep_shared_memory_out_of_a_file() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (folder, shared) = (folder(), in_memory());
    let mut from = source(on_shared_memory(&qemu, NEW, &shared)).unwrap();
    from.set_capabilities(IGNORED).unwrap();
    from.set_capabilities(&[("mapped-ram", true)]).unwrap();
    from.migrate(&file_uri(&path(&folder, "machine"))).unwrap();
    from.wait_migration("failed", PATIENCE).unwrap();
    let at = from.round().unwrap().unwrap_or_default();
    from.wait_round(at + ALL_CHECKED, PATIENCE).unwrap();
}
