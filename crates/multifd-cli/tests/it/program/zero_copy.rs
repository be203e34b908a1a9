//! `--zero-copy-send` and the limit of locked memory.

use serde_json::json;

use crate::kit::{Program, multifd_in, run};

/// Without the privilege to lock memory without limit.
const BOUND: [&str; 3] = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];

fn demo(script: &str, options: &[&str]) -> Program {
    let always = ["demo", "--zero-copy-send", "--dirty-rate", "1M"];
    Program::start(&mut multifd_in(&BOUND, script, &[&always, options].concat()))
}

#[test]
fn too_low_a_limit_is_named() {
    let ended = demo("ulimit -l 64", &["--size", "16M"]).end();
    let told =
        ["(RLIMIT_MEMLOCK, `ulimit -l`) is 64 KiB", "a packet needs up to 520 KiB", "zero-copy-send off"];
    ended.assert_failed(1, &told);
}

/// One packet at a time can be locked, and there are four channels.
#[test]
fn low_limit_is_kept_to_by_copying() {
    let ended = demo("ulimit -l 700", &["--size", "64M", "--json"]).end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["ram-equal"], json!(true));
}

#[test]
fn report_shows_what_was_copied_anyway() {
    let ended = run(["demo", "--zero-copy-send", "--size", "16M"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("zero-copy-send: the kernel copied pages anyway"), "{ended:?}");
}

#[test]
fn it_is_refused_where_pages_are_copied_anyway() {
    let at = ["machine", "tcp:127.0.0.1:1"];
    for (options, at, told) in [
        (&["--multifd-channels", "0"][..], at, "with multifd-channels 0"),
        (&["--multifd-compression", "zlib"], at, "with multifd-compression"),
        (&["--tls-creds", "x"], at, "with tls-creds"),
        (&["--direct-io"], at, "with direct-io"),
        (&[], ["machine", "unix:/nowhere"], "over anything but plain TCP"),
        (&["--multifd-channels", "0"], ["machine", "exec:true"], "with multifd-channels 0"),
    ] {
        let ended = run([&["send", "--zero-copy-send"], options, &at].concat());
        ended.assert_failed(2, &["zero-copy-send cannot be used", told]);
    }
    let ended = run(["demo", "--zero-copy-send", "--multifd-compression", "zstd"]);
    ended.assert_failed(2, &["with multifd-compression"]);
}
