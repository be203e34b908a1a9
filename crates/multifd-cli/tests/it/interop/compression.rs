//! Compressed pages, with real QEMUs at both ends, for each method and sync mode.

use multifd_testkit::qemu::{Error, Qemu, Vm};
use serde_json::json;

use super::journey::Journey;
use crate::kit::{
    Program, fast, first_difference, folder, machine, memory, migrate, path, send, source, stored_memory,
};

fn set_up(vm: &mut Vm, method: &str) -> Result<(), Error> {
    vm.set_multifd_channels(3)?;
    vm.set_parameters(json!({ "multifd-compression": method }))
}

fn both(qemu: Option<Qemu>, machine_type: &'static str, method: &'static str) {
    let Some(qemu) = qemu else { return };
    for live in [true, false] {
        let journey = Journey { live, return_path: live, method, ..Journey::new(&qemu, machine_type) };
        let reports = journey.take().unwrap();
        assert_eq!(reports.received["channels"].as_array().map(Vec::len), Some(3), "{}", reports.received);
    }
}

macro_rules! cells {
    ($($name:ident: $qemu:expr, $machine:expr;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn moves_with_zlib() {
                both($qemu, $machine, "zlib");
            }

            #[test]
            fn moves_with_zstd() {
                both($qemu, $machine, "zstd");
            }
        }
    )*};
}

cells! {
    guest_of_7_2: Qemu::v7_2(), "pc-q35-7.2";
    guest_of_10_0_on_machine_7_2: Qemu::v10_0(), "pc-q35-7.2";
    guest_of_10_0: Qemu::v10_0(), "pc-q35-10.0";
}

#[test]
#[ignore = "slow: a level is not on the wire, and every level is packed and unpacked in the engine's tests"]
fn every_level_of_a_source_arrives_and_every_level_of_ours_is_taken() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let folder = folder();
    for (method, parameter, levels) in
        [("zlib", "multifd-zlib-level", [0, 1, 9]), ("zstd", "multifd-zstd-level", [0, 1, 20])]
    {
        for level in levels {
            let file = path(&folder, &format!("{method}-{level}"));
            let builder = || machine(&qemu, "pc-q35-10.0");
            let mut from = source(builder()).unwrap();
            from.set_capabilities(&[("return-path", true)]).unwrap();
            set_up(&mut from, method).unwrap();
            from.set_parameters(json!({ parameter: level })).unwrap();
            from.stop().unwrap();
            let before = memory(&mut from).unwrap();
            let (receive, address) = Program::receive(&["--json"], "tcp:127.0.0.1:0", &file);
            migrate(&mut from, &address).unwrap();
            receive.done();
            assert_eq!(first_difference(&before, &stored_memory(&file)), None, "{method} {level}");
            let mut to = builder().incoming().start().unwrap();
            set_up(&mut to, method).unwrap();
            let (option, level) = (format!("--{parameter}"), level.to_string());
            let options = ["--multifd-channels", "3", "--multifd-compression", method, &option, &level];
            send(&options, &file, &mut to, "tcp:127.0.0.1:0").unwrap();
            assert_eq!(first_difference(&before, &memory(&mut to).unwrap()), None, "{method} {level}");
        }
    }
}

#[test]
fn a_source_that_packs_otherwise_than_receive_was_told_is_refused_and_its_guest_runs_on() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for (method, told) in [("zlib", "zstd"), ("zstd", "none")] {
        let folder = folder();
        let mut from = source(machine(&qemu, "pc-q35-10.0")).unwrap();
        from.set_capabilities(&[("return-path", true)]).unwrap();
        set_up(&mut from, method).unwrap();
        let options = ["--multifd-compression", told];
        let (receive, address) = Program::receive(&options, "tcp:127.0.0.1:0", &path(&folder, "machine"));
        fast(&mut from).unwrap();
        from.migrate(&address).unwrap();
        let text = format!("expected method {told}, found flags ");
        let remedy = format!("set multifd-compression to {told} at the source");
        receive.end().assert_failed(1, &["channel ", "packet ", &text, &remedy]);
        from.wait_migration("failed", multifd_testkit::qemu::PATIENCE).unwrap();
        assert_eq!(from.run_state().unwrap(), "running");
    }
}
