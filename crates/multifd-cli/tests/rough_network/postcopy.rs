//! A guest that runs at the far host while its memory comes from the near one, over a line that is pulled.

use std::{path::Path, thread::sleep, time::Duration};

use multifd_testkit::{
    qemu::{Error, PATIENCE, Qemu, Vm},
    rough_network::{Line, Network},
};
use serde_json::json;

use crate::kit::{ALL_CHECKED, Program, fast, folder, machine, multifd_in, path, source};

const MIB: u64 = 1 << 20;
/// Slow enough that the line is pulled in the middle.
const RATE: u64 = 20_000_000;

fn near(network: &Network, arguments: &[&str], file: &Path, address: &str) -> Program {
    let launcher = network.near().launcher();
    let launcher: Vec<&str> = launcher.iter().map(String::as_str).collect();
    let file = file.display().to_string();
    let arguments: Vec<&str> = arguments.iter().copied().chain([file.as_str(), address]).collect();
    Program::start(&mut multifd_in(&launcher, "true", &arguments))
}

/// The guest continues, and finds all of its memory right.
fn assert_checks_all(vm: &mut Vm) -> Result<(), Error> {
    let at = vm.round()?.unwrap_or_default();
    vm.wait_round(at + ALL_CHECKED, PATIENCE)?;
    assert_eq!(vm.run_state()?, "running");
    Ok(())
}

fn port(vm: &mut Vm) -> Result<String, Error> {
    let found = vm.query_migrate()?;
    Ok(found["socket-address"][0]["port"].as_str().unwrap_or_else(|| panic!("{found}")).to_owned())
}

/// Pulled for a second, the line carries on where it was. Pulled for longer than the limit of the connection, the program
/// fails and says where the guest is. QEMU does not notice a silent line, so its connection is ended by `yank`; then another
/// program sends the rest.
fn pulled(qemu: &Qemu, preempt: bool) -> Result<(), Error> {
    let Some(network) = Network::new(&Line { rate: Some(RATE), ..Line::default() }) else { return Ok(()) };
    let folder = folder();
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, &qemu.machine()))?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    fast(&mut from)?;
    from.migrate(&address)?;
    from.wait_migration("completed", PATIENCE)?;
    receive.done();
    drop(from);

    let mut to = machine(qemu, &qemu.machine()).incoming().launcher(network.far().launcher()).start()?;
    to.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)])?;
    let host = network.far().address();
    to.migrate_incoming(&format!("tcp:{host}:0"))?;
    let address = format!("tcp:{host}:{},user-timeout=5", port(&mut to)?);
    let mut options = vec!["send", "--postcopy-ram", "--no-working-set"];
    if preempt {
        options.push("--postcopy-preempt");
    }
    let sends = near(&network, &options, &file, &address);
    assert!(network.wait_carried(2 * MIB, PATIENCE), "{:?}", network.carried());
    network.pull();
    sleep(Duration::from_secs(1));
    network.plug();
    let before = network.carried()[0].bytes;
    assert!(network.wait_carried(before + MIB, PATIENCE), "{:?}", network.carried());
    network.pull();
    let ended = sends.end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("the guest belongs to the destination"), "{ended:?}");
    network.plug();

    to.execute("yank", json!({ "instances": [{ "type": "migration" }] }))?;
    to.wait_migration("postcopy-paused", PATIENCE)?;
    to.execute("migrate-recover", json!({ "uri": format!("tcp:{host}:0") }))?;
    let address = format!("tcp:{host}:{}", port(&mut to)?);
    options[1] = "--resume";
    near(&network, &options, &file, &address).done();
    to.wait_migration("completed", PATIENCE)?;
    assert_checks_all(&mut to)
}

#[test]
fn guest_gets_all_of_its_memory_although_the_line_was_pulled() {
    for (qemu, preempt) in [(Qemu::v7_2(), false), (Qemu::v10_0(), true)] {
        let Some(qemu) = qemu else { continue };
        pulled(&qemu, preempt)
            .unwrap_or_else(|error| panic!("QEMU {}, preempt {preempt}: {error}", qemu.series()));
    }
}
