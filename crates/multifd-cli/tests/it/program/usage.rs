//! The command line itself.

use std::{fs, path::Path};

use crate::kit::run;

#[track_caller]
fn assert_usage(arguments: &[&str], told: &str) {
    let ended = run(arguments);
    ended.assert_failed(2, &[told]);
    assert!(ended.stdout.is_empty(), "{ended:?}");
}

#[test]
fn help_is_a_result() {
    for arguments in
        [&["--help"][..], &["receive", "--help"], &["send", "-h"], &["help", "inspect"], &["demo", "-h"]]
    {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stdout.contains("Usage: multifd") && ended.stderr.is_empty(), "{ended:?}");
    }
    let verbs = run(["--help"]).stdout;
    assert!(["receive", "send", "inspect", "demo"].iter().all(|verb| verbs.contains(verb)), "{verbs}");
    assert!(!verbs.contains("demo-destination"), "{verbs}");
}

#[test]
fn version_is_a_result() {
    let ended = run(["--version"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.stdout, format!("multifd {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn no_verb_is_refused_with_the_usage() {
    assert_usage(&[], "Usage: multifd");
}

#[test]
fn unknown_verb_is_refused() {
    assert_usage(&["recieve"], "recieve");
}

#[test]
fn unknown_flag_is_refused() {
    assert_usage(&["receive", "--chanels", "2", "tcp:127.0.0.1:0", "machine"], "--chanels");
}

/// Regression: `invalid digit found in string`, `300 is not in 0..=255`.
#[test]
fn number_that_is_none_is_refused_with_the_range() {
    let of_send = |flag: &str, value: &str, told: &str| {
        assert_usage(&["send", flag, value, "machine", "tcp:127.0.0.1:1"], told);
    };
    for value in ["x", "300", "1.5"] {
        let told = format!("expected a whole number from 0 to 255, found {value:?}");
        of_send("--multifd-channels", value, &told);
    }
    of_send("--multifd-zstd-level", "99", "expected a whole number from 0 to 20, found \"99\"");
    assert_usage(
        &["demo", "--cpu-throttle-initial", "x"],
        "expected a whole number from 1 to 99, found \"x\"",
    );
    assert_usage(&["demo", "--channels", "0"], "expected a whole number from 1 to 255, found \"0\"");
    assert_usage(&["demo", "--max-passes", "x"], "expected a whole number from 0 on, found \"x\"");
}

#[test]
fn missing_argument_is_named() {
    assert_usage(&["receive", "tcp:127.0.0.1:0"], "<FILE>");
}

#[test]
fn address_that_is_none_is_refused_with_the_forms_that_are() {
    assert_usage(&["receive", "127.0.0.1:4444", "machine"], "did you mean tcp:127.0.0.1:4444?");
    assert_usage(&["receive", "tcp:127.0.0.1", "machine"], "port missing");
    assert_usage(&["send", "machine", "tcp:host:99999"], "port 99999 is above 65535");
    assert_usage(&["receive", "machine", "tcp:127.0.0.1:0"], "did you swap LISTEN and FILE?");
    assert_usage(&["send", "tcp:127.0.0.1:1", "machine"], "did you swap the file and the address?");
    assert_usage(&["receive", "tcp:127.0.0.1:0", "file:machine,ofset=1"], "found the option \"ofset=1\"");
    assert_usage(&["send", "machine", "rdma:host:1"], "tcp:HOST:PORT, unix:PATH");
    assert_usage(&["send", "machine", "tcp:host:1,to=5"], "ipv4=on|off, ipv6=on|off");
}

#[test]
fn number_of_channels_beyond_the_range_is_refused() {
    assert_usage(
        &["receive", "--multifd-channels", "256", "tcp:127.0.0.1:0", "machine"],
        "--multifd-channels",
    );
    assert_usage(&["send", "--multifd-channels", "256", "machine", "tcp:127.0.0.1:1"], "--multifd-channels");
    assert_usage(&["send", "--multifd-channels", "auto", "machine", "tcp:127.0.0.1:1"], "--multifd-channels");
    assert_usage(&["demo", "--multifd-channels", "0"], "--multifd-channels");
    assert_usage(&["demo", "--channels", "0"], "--multifd-channels");
}

#[test]
fn uuid_that_is_none_is_refused() {
    assert_usage(&["send", "--uuid", "00112233", "machine", "tcp:127.0.0.1:1"], "--uuid");
}

#[test]
fn sync_mode_that_is_none_is_refused_with_those_that_are() {
    assert_usage(&["send", "--sync-mode", "never", "machine", "tcp:127.0.0.1:1"], "auto, legacy, round");
}

#[test]
fn method_that_is_none_of_ours_is_refused_with_those_that_are() {
    let told = "expected multifd-compression none, zlib or zstd, found \"qpl\"";
    assert_usage(&["send", "--multifd-compression", "qpl", "machine", "tcp:127.0.0.1:1"], told);
    assert_usage(&["demo", "--multifd-compression", "qpl"], told);
    let told = told.to_owned() + ", or auto";
    assert_usage(&["receive", "--multifd-compression", "qpl", "tcp:127.0.0.1:0", "machine"], &told);
}

#[test]
fn level_beyond_the_range_is_refused_with_the_range() {
    for (level, most, range) in
        [("--multifd-zlib-level", "10", "from 0 to 9"), ("--multifd-zstd-level", "21", "from 0 to 20")]
    {
        assert_usage(&["send", level, most, "machine", "tcp:127.0.0.1:1"], range);
        assert_usage(&["demo", level, most], range);
    }
}

/// As in QEMU it is a parameter, which has no effect before its method is set.
#[test]
fn level_without_its_method_is_taken() {
    let ended = run(["send", "--multifd-zstd-level", "3", "no/such/machine", "tcp:127.0.0.1:1"]);
    ended.assert_failed(1, &["cannot read no/such/machine"]);
}

#[test]
fn size_or_time_that_is_none_is_refused_with_the_units() {
    assert_usage(&["demo", "--size", "lots"], "expected a size in bytes, or with a unit (4K, 100M, 2G;");
    let send = |option: &str, value: &str, told: &str| {
        assert_usage(&["send", option, value, "machine", "tcp:127.0.0.1:1"], told);
    };
    send("--max-bandwidth", "fast", "expected a rate in bytes per second, or with a unit (4K, 100M, 2G;");
    let told = "expected a time in seconds, or with a unit (500ms, 90s, 2m, 1.5h), found \"soon\"";
    for option in ["--stall-timeout", "--connect-timeout", "--end-timeout"] {
        send(option, "soon", told);
    }
    assert_usage(&["receive", "--stall-timeout", "soon", "tcp:127.0.0.1:0", "machine"], told);
    assert_usage(&["demo", "--max-total-time", "soon"], told);
    assert_usage(&["demo", "--downtime-limit", "soon"], "expected a time in milliseconds, or with a unit");
}

#[test]
fn time_with_a_unit_is_kept() {
    // Nothing listens there, or the connection is dropped: it takes no longer than the limit.
    let begun = std::time::Instant::now();
    let limits = ["--connect-timeout=500ms", "--stall-timeout=2m", "--end-timeout=1h"];
    let ended = run([&["send"], &limits[..], &["no/such/machine", "tcp:127.0.0.1:1"]].concat());
    ended.assert_failed(1, &["cannot read no/such/machine"]);
    assert!(begun.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn channels_is_short_for_multifd_channels() {
    for verb in [
        &["receive", "--channels", "2", "no-address", "machine"][..],
        &["send", "--channels", "2", "machine", "no-address"],
    ] {
        assert_usage(verb, "expected an address like");
    }
}

#[test]
fn method_without_channels_is_refused() {
    let told = "multifd-compression has no effect with multifd-channels 0: switch it off, or use channels";
    let send =
        ["send", "--multifd-channels", "0", "--multifd-compression", "zstd", "machine", "tcp:127.0.0.1:1"];
    assert_usage(&send, told);
}

#[test]
fn tls_to_an_address_without_a_host_is_refused_without_a_name() {
    let told = "has no host name to compare with the certificate (tls-creds): set tls-hostname";
    for address in ["unix:/no/such/socket", "tcp::1"] {
        assert_usage(&["send", "--tls-creds", "no/such/folder", "machine", address], told);
    }
    let named = ["send", "--tls-creds", "no/such/folder", "--tls-hostname", "x", "machine", "unix:/no/such"];
    run(named).assert_failed(1, &["no/such/folder"]);
}

#[test]
fn channels_over_one_inherited_connection_are_refused() {
    assert_usage(&["send", "machine", "fd:0"], "fd:0");
}

#[test]
fn channels_over_a_command_are_refused() {
    let told = "exec:cat is a single connection and cannot carry channels: set multifd-channels to 0";
    assert_usage(&["send", "machine", "exec:cat"], told);
    assert_usage(&["receive", "--multifd-channels", "2", "exec:cat", "machine"], told);
}

/// The messages of the page for troubleshooting, each in the source of the program or of a library.
#[test]
fn messages_of_the_page_for_troubleshooting_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = fs::read_to_string(root.join("docs/use/troubleshooting.md")).unwrap();
    let mut sources = String::new();
    let mut folders: Vec<_> = ["multifd", "qemu-stream", "multifd-cli"]
        .map(|name| root.join("crates").join(name).join("src"))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else {
                sources += &fs::read_to_string(entry).unwrap();
            }
        }
    }
    // A text that goes on in the next line ends with a backslash.
    let lines: Vec<_> = sources.lines().map(str::trim_start).collect();
    let sources = lines.join("\n").replace("\\\n", "");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    let messages: Vec<_> = rows.map(|(message, _)| message).collect();
    assert!(messages.len() > 10, "{messages:?}");
    for message in messages {
        assert!(sources.contains(message), "no source has {message:?}");
    }
}
