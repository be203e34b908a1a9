//! A destination with another setting than `send`: it fails at once, and the error names that setting first or second.
//!
//! The causes of an error are in the order of likelihood for how far the destination had come.

use std::{path::Path, time::Duration};

use multifd_testkit::{
    certificates::write_both,
    qemu::{Error, Qemu, Vm, VmBuilder},
};
use serde_json::json;

use super::journey::with_tls;
use crate::kit::{Program, feed, folder, machine, migrate, path, source};

/// A destination that differs from the source.
struct Differing {
    vm: fn(VmBuilder, &Path) -> VmBuilder,
    set: fn(&mut Vm) -> Result<(), Error>,
    options: &'static [&'static str],
    told: &'static [&'static str],
}

const SAME: Differing = Differing {
    vm: |vm, _| vm,
    set: |vm| vm.set_multifd_channels(4),
    options: &["--multifd-channels", "4"],
    told: &[],
};

/// Sends to it, and compares the error.
fn differs(qemu: &Qemu, case: &Differing) -> Result<(), Error> {
    let (folder, tls) = (folder(), folder());
    write_both(tls.path()).expect("certificates");
    let file = path(&folder, "machine");
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.set_multifd_channels(2)?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &file);
    migrate(&mut from, &address)?;
    receive.done();
    let mut to = (case.vm)(machine(qemu, &qemu.machine()), tls.path()).incoming().start()?;
    (case.set)(&mut to)?;
    let address = to.migrate_incoming("tcp:127.0.0.1:0")?;
    let options: Vec<String> =
        case.options.iter().map(|word| word.replace("TLS", tls.path().to_str().expect("text"))).collect();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let ended = feed(&options, &file, &address).end_within(Duration::from_secs(20));
    ended.assert_failed(1, case.told);
    ended.assert_failed(1, &["the file is unchanged"]);
    assert!(!ended.stderr.contains("at the source"), "a file is no running source: {ended:?}");
    Ok(())
}

macro_rules! destinations {
    ($($name:ident: $case:expr;)*) => {$(
        #[test]
        fn $name() {
            let Some(qemu) = Qemu::v10_0() else { return };
            differs(&qemu, &$case).unwrap();
        }
    )*};
}

const CHANNEL: &[&str] = &[
    "channel ",
    "likely causes, the likeliest first: another multifd-compression, another multifd-channels",
];

destinations! {
    destination_that_expects_zstd_fails_at_once: Differing {
        set: |vm| {
            vm.set_multifd_channels(4)?;
            vm.set_parameters(json!({ "multifd-compression": "zstd" }))
        },
        told: CHANNEL,
        ..SAME
    };
    destination_that_expects_zlib_fails_at_once: Differing {
        set: |vm| {
            vm.set_multifd_channels(4)?;
            vm.set_parameters(json!({ "multifd-compression": "zlib" }))
        },
        told: CHANNEL,
        ..SAME
    };
    destination_that_expects_no_compression_fails_at_once: Differing {
        options: &["--multifd-channels", "4", "--multifd-compression", "zstd"],
        told: CHANNEL,
        ..SAME
    };
    destination_with_fewer_channels_fails_at_once: Differing {
        set: |vm| vm.set_multifd_channels(2),
        // Main or a channel is seen to be closed first.
        told: &["likely causes, the likeliest first: another", "another multifd-channels (or multifd o"],
        ..SAME
    };
    destination_with_multifd_off_fails_at_once: Differing {
        set: |_| Ok(()),
        // Main or a channel is seen to be closed first.
        told: &["likely causes, the likeliest first: another", "another multifd-channels (or multifd o"],
        ..SAME
    };
    destination_with_other_ram_names_the_ram_size_first: Differing {
        vm: |vm, _| vm.memory(64 << 20),
        told: &["reported failure (SHUT 1)", "accepted the machine type; likely causes, the likeliest first: another RAM size"],
        ..SAME
    };
    destination_of_another_machine_type_names_it_first: Differing {
        vm: |vm, _| vm.machine("pc-q35-9.2"),
        told: &["another machine type"],
        ..SAME
    };
    destination_without_a_device_names_the_devices_first: Differing {
        vm: |vm, _| vm.args(["-machine", "i8042=off"]),
        told: &["it had all of RAM; likely causes, the likeliest first: other devices"],
        ..SAME
    };
    destination_with_tls_is_told_from_one_without: Differing {
        vm: |vm, tls| with_tls(vm, tls, "server"),
        set: |vm| {
            vm.set_multifd_channels(4)?;
            vm.set_parameters(json!({ "tls-creds": "tls0" }))
        },
        // QEMU closes the connection without a TLS alert, as it does for another machine type.
        told: &["likely causes, the likeliest first: another", "TLS on one side only"],
        ..SAME
    };
    destination_without_tls_is_told_from_one_with: Differing {
        options: &["--multifd-channels", "4", "--tls-creds", "TLS"],
        told: &["closed the connection during the TLS handshake: check that it uses TLS (tls-creds)"],
        ..SAME
    };
}
