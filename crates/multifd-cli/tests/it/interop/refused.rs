//! Options of a source that we do not support: an error that says what was found and which capability to switch off,
//! and a guest that continues.

use std::time::Duration;

use multifd_testkit::{
    certificates,
    qemu::{Error, PATIENCE, Qemu, Vm},
};

use crate::kit::{Program, assert_left, fast, folder, machine, path, source};

/// An additional option of the source.
type Setting = fn(&mut Vm) -> Result<(), Error>;

fn refused(qemu: &Qemu, channels: u8, setting: Setting, told: &[&str]) -> Result<(), Error> {
    let folder = folder();
    let mut from = source(machine(qemu, &qemu.machine()))?;
    from.set_capabilities(&[("return-path", true)])?;
    from.set_multifd_channels(channels)?;
    setting(&mut from)?;
    fast(&mut from)?;
    let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &path(&folder, "machine"));
    from.migrate(&address)?;
    receive.end_within(Duration::from_secs(8)).assert_failed(1, told);
    assert_left(&folder, &[]);
    from.wait_migration("failed", PATIENCE)?;
    from.wait_run_state("running", PATIENCE)?;
    let at = from.round()?.unwrap_or_default();
    from.wait_round(at + 3, PATIENCE).map(drop)
}

macro_rules! refusals {
    ($($name:ident: $qemu:expr, $channels:expr, $setting:expr, $told:expr;)*) => {$(
        #[test]
        fn $name() {
            let Some(qemu) = $qemu else { return };
            refused(&qemu, $channels, $setting, $told).unwrap();
        }
    )*};
}

refusals! {
    compressed_pages_are_refused: Qemu::v7_2(), 0,
        |vm| vm.set_capabilities(&[("compress", true)]), &["capability compress"];
}

/// The source fails at once, and `receive` waited for another one without limit.
#[test]
fn source_without_tls_ends_a_destination_with_tls_at_its_limit() {
    for qemu in [Qemu::v7_2(), Qemu::v10_0()].into_iter().flatten() {
        let folder = folder();
        certificates::write_both(folder.path()).unwrap();
        let mut from = source(machine(&qemu, &qemu.machine())).unwrap();
        let options = ["--tls-creds", folder.path().to_str().unwrap(), "--max-refused", "1"];
        let (receive, address) = Program::receive(&options, "tcp:127.0.0.1:0", &path(&folder, "machine"));
        from.migrate(&address).unwrap();
        let told = ["1 connection was refused (max-refused)", "check TLS"];
        receive.end_within(Duration::from_secs(8)).assert_failed(1, &told);
        from.wait_run_state("running", PATIENCE).unwrap();
    }
}
