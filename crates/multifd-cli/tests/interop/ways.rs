//! The other ways in and out: QEMU's own files, no channels at all, other transports, what cannot be.

use std::time::Instant;

use multifd_testkit::{
    guest::Guest,
    qemu::{PATIENCE, Qemu},
};
use serde_json::json;

use crate::kit::{
    Folder, Receive, SOON, Way, assert_stored, capture, migrate, restore, runs_on, send, start,
};

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

#[test]
fn qemu_10_0_loads_our_file_itself() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for (machine, channels) in [("pc-q35-10.0", 0), ("pc-q35-10.0", 3), ("pc-q35-7.2", 2)] {
        let (guest, folder) = (Guest::new(), Folder::new());
        let file = folder.path("guest");
        let way = Way { passes: 4, ..Way::new(machine) };
        capture(&mut start(&qemu, &way, &guest, false), &way, "tcp:127.0.0.1:0", &file, &[]);
        let mut destination = start(&qemu, &Way { channels, ..way }, &guest, true);
        destination.set_capabilities(&[("mapped-ram", true)]).unwrap();
        let address = format!("file:{}", file.display());
        destination.execute("migrate-incoming", json!({ "uri": address })).unwrap();
        runs_on(&mut destination);
    }
}

#[test]
fn qemu_10_0s_own_file_is_sent() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for (channels, passes) in [(0, 0), (0, 2), (2, 2)] {
        let (guest, folder) = (Guest::new(), Folder::new());
        let file = folder.path("guest");
        let way = Way { channels, passes, return_path: false, ..Way::new("pc-q35-10.0") };
        {
            let mut source = start(&qemu, &way, &guest, false);
            source.set_capabilities(&[("mapped-ram", true)]).unwrap();
            migrate(&mut source, &way, &format!("file:{}", file.display()));
            if passes == 0 {
                assert_stored(&mut source, &file);
            }
        }
        restore(&qemu, &Way { channels: 3, ..way }, &guest, &file, "tcp:127.0.0.1:0");
    }
}

#[test]
fn with_multifd_off_pages_go_over_main_both_ways() {
    let Some([old, new]) = Qemu::both() else { return };
    for (qemu, passes) in [(&old, 0), (&new, 0), (&old, 4), (&new, 4)] {
        let (guest, folder) = (Guest::new(), Folder::new());
        let file = folder.path("guest");
        let way = Way { channels: 0, passes, ..Way::new("pc-q35-7.2") };
        {
            let mut source = start(qemu, &way, &guest, false);
            capture(&mut source, &way, "tcp:127.0.0.1:0", &file, &[]);
            if passes == 0 {
                assert_stored(&mut source, &file);
            }
        }
        restore(qemu, &way, &guest, &file, "tcp:127.0.0.1:0");
    }
}

#[test]
fn unix_sockets_and_ipv6_carry_channels() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (guest, folder) = (Guest::new(), Folder::new());
    let socket = |name: &str| format!("unix:{}", folder.path(name).display());
    for (n, listen) in [(0, socket("in")), (1, "tcp:[::1]:0".to_owned())] {
        let file = folder.path(&format!("guest{n}"));
        let way = Way { channels: 4, passes: 2, ..Way::new("pc-q35-10.0") };
        capture(&mut start(&qemu, &way, &guest, false), &way, &listen, &file, &[]);
        let listen = if n == 0 { socket("out") } else { listen };
        restore(&qemu, &way, &guest, &file, &listen);
    }
}

#[test]
fn every_zero_page_detection_of_10_0_is_taken() {
    let Some(qemu) = Qemu::v10_0() else { return };
    for detection in ["none", "legacy", "multifd"] {
        let (guest, folder) = (Guest::new(), Folder::new());
        let file = folder.path("guest");
        let parameters = json!({ "zero-page-detection": detection });
        let way = Way { parameters, ..Way::new("pc-q35-10.0") };
        let mut source = start(&qemu, &way, &guest, false);
        let report = capture(&mut source, &way, "tcp:127.0.0.1:0", &file, &[]);
        assert_stored(&mut source, &file);
        assert_eq!(report["ram"]["duplicate"] == 0, detection == "none", "{report}");
    }
}

#[test]
fn a_machines_uuid_is_kept_and_a_foreign_one_refused() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (guest, folder) = (Guest::new(), Folder::new());
    let file = folder.path("guest");
    let way = Way { uuid: Some(UUID), ..Way::new("pc-q35-10.0") };
    let mut source = start(&qemu, &way, &guest, false);
    source.set_capabilities(&[("validate-uuid", true)]).unwrap();
    capture(&mut source, &way, "tcp:127.0.0.1:0", &file, &[]);
    restore(&qemu, &way, &guest, &file, "tcp:127.0.0.1:0");

    let mut stranger = start(
        &qemu,
        &Way { uuid: Some("ff112233-4455-6677-8899-aabbccddeeff"), ..way.clone() },
        &guest,
        true,
    );
    let address = stranger.migrate_incoming("tcp:127.0.0.1:0").unwrap();
    let sent = send(&way, &file, &address, &[]);
    let talk = String::from_utf8_lossy(&sent.stderr);
    assert_eq!(sent.status.code(), Some(1), "{talk}");
    assert!(talk.contains("stands in its own log: channel count, method, UUID"), "{talk}");
}

#[test]
fn another_number_of_channels_is_told_and_the_guest_runs_on() {
    let Some(qemu) = Qemu::v10_0() else { return };
    let (guest, folder) = (Guest::new(), Folder::new());
    let way = Way::new("pc-q35-10.0");
    let mut source = start(&qemu, &way, &guest, false);
    let receive = Receive::start("tcp:127.0.0.1:0", &folder.path("guest"), &["--multifd-channels", "3"]);
    source.set_capabilities(&[("return-path", true)]).unwrap();
    let at = source.wait_round(1, PATIENCE).unwrap();
    let begin = Instant::now();
    source.migrate(&receive.address).unwrap();
    let (report, talk, code) = receive.end();
    assert!(begin.elapsed() < SOON);
    assert_eq!((code, report["status"].as_str()), (Some(1), Some("failed")), "{talk}");
    assert!(talk.contains("expected 3 channels, 2 connected before the first sync"), "{talk}");
    assert_eq!(folder.contents(), [""; 0], "nothing is left");
    source.wait_migration("failed", PATIENCE).unwrap();
    source.wait_round(at + 5, PATIENCE).unwrap();
}
