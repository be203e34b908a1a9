//! source → `receive` → file → `send` → destination, for every pair of QEMU and machine type, number of channels,
//! with and without return path, running and stopped.
//!
//! A stopped guest's memory is compared three times: at the source, in the file, at the destination. Then, as a
//! running one does at once, it runs on and checks all of it.

use multifd_testkit::qemu::{Error, Qemu};
use serde_json::{Value, json};

use crate::kit::{
    Program, first_difference, folder, leave, machine, memory, path, runs_on, send, source, stored_memory,
};

/// What is tried.
struct Cell {
    qemu: Qemu,
    machine: &'static str,
    channels: u8,
    return_path: bool,
    live: bool,
}

fn there_and_back(cell: &Cell) -> Result<(), Error> {
    let folder = folder();
    let file = path(&folder, "machine");
    let builder = || machine(&cell.qemu, cell.machine);
    let mut from = source(builder())?;
    from.set_capabilities(&[("return-path", cell.return_path)])?;
    from.set_multifd_channels(cell.channels)?;
    let exact = cell.channels.to_string();
    // Most learn the number of channels; some are told it.
    let channels = if cell.channels == 4 { exact.as_str() } else { "auto" };

    let (receive, address) =
        Program::receive(&["--json", "--multifd-channels", channels], "tcp:127.0.0.1:0", &file);
    let before = leave(&mut from, &address, cell.live.then_some(4))?;
    let received = receive.done().json();

    assert_channels(&received, cell.channels);
    let mut to = builder().incoming().start()?;
    to.set_multifd_channels(cell.channels)?;
    let sent = send(&["--multifd-channels", &exact], &file, &mut to, "tcp:127.0.0.1:0")?.json();
    assert_channels(&sent, cell.channels);
    if !cell.live {
        assert_eq!(first_difference(&before, &stored_memory(&file)), None, "page, source and file");
        assert_eq!(first_difference(&before, &memory(&mut to)?), None, "page, source and destination");
        to.cont()?;
    }
    runs_on(&from, &mut to)
}

/// Every channel has carried its share, and the sum is right.
fn assert_channels(report: &Value, channels: u8) {
    let listed = report["channels"].as_array().expect("channels");
    let ids: Vec<u64> = listed.iter().filter_map(|channel| channel["id"].as_u64()).collect();
    let bytes: u64 = listed.iter().filter_map(|channel| channel["bytes"].as_u64()).sum();
    assert_eq!(ids, (0..channels.into()).collect::<Vec<u64>>(), "{report}");
    assert_eq!(Some(bytes), report["ram"]["multifd-bytes"].as_u64(), "{report}");
    assert_eq!(report["status"], json!("completed"), "{report}");
}

macro_rules! cells {
    ($($name:ident: $qemu:expr, $machine:expr, $live:expr;)*) => {$(
        mod $name {
            use super::*;

            fn cell(channels: u8, return_path: bool) {
                let Some(qemu) = $qemu else { return };
                there_and_back(&Cell { qemu, machine: $machine, channels, return_path, live: $live }).unwrap();
            }

            #[test]
            fn moves_over_1_channel_with_return_path() {
                cell(1, true);
            }

            #[test]
            fn moves_over_2_channels_with_return_path() {
                cell(2, true);
            }

            #[test]
            fn moves_over_4_channels_with_return_path() {
                cell(4, true);
            }

            #[test]
            fn moves_over_8_channels_with_return_path() {
                cell(8, true);
            }

            #[test]
            fn moves_over_1_channel_without_return_path() {
                cell(1, false);
            }

            #[test]
            fn moves_over_2_channels_without_return_path() {
                cell(2, false);
            }

            #[test]
            fn moves_over_4_channels_without_return_path() {
                cell(4, false);
            }

            #[test]
            fn moves_over_8_channels_without_return_path() {
                cell(8, false);
            }
        }
    )*};
}

cells! {
    running_guest_of_7_2: Qemu::v7_2(), "pc-q35-7.2", true;
    stopped_guest_of_7_2: Qemu::v7_2(), "pc-q35-7.2", false;
    running_guest_of_10_0_on_machine_7_2: Qemu::v10_0(), "pc-q35-7.2", true;
    stopped_guest_of_10_0_on_machine_7_2: Qemu::v10_0(), "pc-q35-7.2", false;
    running_guest_of_10_0: Qemu::v10_0(), "pc-q35-10.0", true;
    stopped_guest_of_10_0: Qemu::v10_0(), "pc-q35-10.0", false;
}
