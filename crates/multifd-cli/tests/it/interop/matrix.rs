//! A guest's path for every pair of QEMU and machine type, number of channels, with and without return path, running
//! and stopped; then for every method, with and without TLS, in every zero-page mode.

use multifd_testkit::qemu::Qemu;
use serde_json::{Value, json};

use super::journey::{Journey, assert_mode};

/// Asserts that every channel has carried its share, and that the sum is right.
fn assert_channels(report: &Value, channels: u8) {
    let listed = report["channels"].as_array().expect("channels");
    let ids: Vec<u64> = listed.iter().filter_map(|channel| channel["id"].as_u64()).collect();
    let bytes: u64 = listed.iter().filter_map(|channel| channel["bytes"].as_u64()).sum();
    assert_eq!(ids, (0..channels.into()).collect::<Vec<u64>>(), "{report}");
    assert_eq!(Some(bytes), report["ram"]["multifd-bytes"].as_u64(), "{report}");
    assert_eq!(report["status"], json!("completed"), "{report}");
}

fn over(qemu: Option<Qemu>, machine: &'static str, live: bool, channels: u8, return_path: bool) {
    let Some(qemu) = qemu else { return };
    let reports = Journey { channels, live, return_path, ..Journey::new(&qemu, machine) }.take().unwrap();
    assert_channels(&reports.received, channels);
    assert_channels(&reports.sent, channels);
}

/// Zero-page modes of a source and of `send`, each with each way of carrying pages, running and stopped, with and
/// without return path.
fn every_way(qemu: Option<Qemu>, machine: &'static str, method: &'static str, tls: bool) {
    let Some(qemu) = qemu else { return };
    // The zero-page mode of a 7.2 cannot be chosen, and from us it accepts only its own.
    let modes: &[_] = if qemu.series() == "7.2" {
        &[(None, "legacy"), (None, "none")]
    } else {
        &[(Some("none"), "multifd"), (Some("legacy"), "none"), (Some("multifd"), "legacy")]
    };
    for (zero_there, zero_back) in modes.iter().copied() {
        for (live, return_path) in [(true, true), (true, false), (false, true), (false, false)] {
            let journey = Journey {
                live,
                return_path,
                tls,
                method,
                zero_there,
                zero_back,
                ..Journey::new(&qemu, machine)
            };
            let reports = journey.take().unwrap_or_else(|error| panic!("{journey:?}: {error}"));
            assert_mode(&reports.received, zero_there.unwrap_or("legacy"));
            assert_mode(&reports.sent, journey.mode_back(zero_back));
        }
    }
}

macro_rules! cells {
    ($($name:ident: $qemu:expr, $machine:expr;)*) => {$(
        mod $name {
            use super::*;

            fn cell(channels: u8, return_path: bool) {
                for live in [true, false] {
                    over($qemu, $machine, live, channels, return_path);
                }
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

            #[test]
            #[ignore = "slow: the whole product, of which the quick tests of each option show a part"]
            fn moves_plain_in_every_way() {
                every_way($qemu, $machine, "none", false);
            }

            #[test]
            #[ignore = "slow: the whole product, of which the quick tests of each option show a part"]
            fn moves_by_zlib_in_every_way() {
                every_way($qemu, $machine, "zlib", false);
            }

            #[test]
            #[ignore = "slow: the whole product, of which the quick tests of each option show a part"]
            fn moves_by_zstd_in_every_way() {
                every_way($qemu, $machine, "zstd", false);
            }

            #[test]
            #[ignore = "slow: the whole product, of which the quick tests of each option show a part"]
            fn moves_over_tls_in_every_way() {
                every_way($qemu, $machine, "none", true);
            }

            #[test]
            #[ignore = "slow: the whole product, of which the quick tests of each option show a part"]
            fn moves_by_zlib_over_tls_in_every_way() {
                every_way($qemu, $machine, "zlib", true);
            }

            #[test]
            #[ignore = "slow: the whole product, of which the quick tests of each option show a part"]
            fn moves_by_zstd_over_tls_in_every_way() {
                every_way($qemu, $machine, "zstd", true);
            }
        }
    )*};
}

cells! {
    guest_of_7_2: Qemu::v7_2(), "pc-q35-7.2";
    guest_of_10_0_on_machine_7_2: Qemu::v10_0(), "pc-q35-7.2";
    guest_of_10_0: Qemu::v10_0(), "pc-q35-10.0";
}
