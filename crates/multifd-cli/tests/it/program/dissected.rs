//! The Wireshark dissector: its names are those of the page on the format, and it reads a whole migration.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use qemu_stream::recording::{RecordKind, Recording, Side};

use super::recorded::recording_of_two_channels;
use crate::kit::{folder, path};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn script() -> PathBuf {
    root().join("contrib/wireshark/multifd.lua")
}

/// The rows of the first table after a heading of the page, cell by cell.
fn rows<'a>(page: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let (_, after) = page.split_once(heading).expect("a heading");
    let table = after.lines().skip_while(|line| !line.starts_with('|'));
    let table = table.take_while(|line| line.starts_with('|')).skip(2);
    table.map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

#[test]
fn names_of_the_dissector_are_those_of_the_page() {
    let page = fs::read_to_string(root().join("docs/develop/stream-format.md")).expect("the page");
    let script = fs::read_to_string(script()).expect("the script");
    let number = |text: &str| {
        let text = text.trim_matches('`').replace(' ', "");
        let hex = text.strip_prefix("0x").unwrap_or(&text);
        u32::from_str_radix(hex, 16).expect("a number")
    };
    let mut checked = 0;
    for (table, heading, is_hex) in [
        ("SECTIONS", "### Sections", true),
        ("COMMANDS", "### Commands", false),
        ("REPLIES", "### Return path", false),
        ("RECORDS", "### The RAM section", true),
    ] {
        let (_, lua) = script.split_once(&format!("local {table} = {{")).expect("a table");
        let (lua, _) = lua.split_once("\n}").expect("its end");
        let entries: BTreeMap<u32, &str> = lua
            .lines()
            .filter_map(|line| line.trim().strip_prefix('[')?.split_once("] = "))
            .map(|(key, name)| {
                let key = key.strip_prefix("0x").map_or_else(|| key.parse().expect("a number"), number);
                (key, name.trim_matches([',', '"']))
            })
            .collect();
        let mut known = entries.len();
        for row in rows(&page, heading) {
            let (key, name) = (row[0], row[1]);
            if name == "CONTINUE" {
                assert!(script.contains(&format!("local CONTINUE = {}", key.trim_matches('`'))));
                continue;
            }
            let key = match key.parse() {
                Ok(number) if !is_hex => number,
                _ => number(key),
            };
            assert_eq!(entries.get(&key), Some(&name), "{table}: {key:#x}");
            (known, checked) = (known - 1, checked + 1);
        }
        assert_eq!(known, 0, "{table} has names that the page lacks");
    }
    assert!(checked > 30, "{checked}");
}

/// A capture file with the bytes of a recording, as TCP connections of one network.
fn capture(recording: &Path, out: &Path) {
    let bytes = fs::read(recording).expect("the file");
    let recording = Recording::open(File::open(recording).expect("the file")).expect("a recording");
    let mut pcap = Vec::new();
    // Big-endian: microseconds, version 2.4, Ethernet.
    for word in [0xa1b2_c3d4, 2 << 16 | 4, 0, 0, 1 << 18, 1] {
        pcap.extend(u32::to_be_bytes(word));
    }
    let mut sent = BTreeMap::<(u16, bool), u32>::new();
    let mut records = recording.records();
    while let Some(record) = records.next().expect("whole") {
        let (head, number) = (record.head, record.head.connection.number());
        if head.kind != RecordKind::Data {
            continue;
        }
        let from = usize::try_from(record.body).expect("small");
        let body = &bytes[from..from + head.length as usize];
        let (is_source, at) = (head.side == Side::Source, head.at);
        for piece in body.chunks(1400) {
            let acknowledged = sent.get(&(number, !is_source)).copied().unwrap_or_default();
            let sequence = sent.entry((number, is_source)).or_default();
            let (source, destination) = ((1_u8, 40_000 + number), (2_u8, 4444));
            let (from, to) = if is_source { (source, destination) } else { (destination, source) };
            let mut frame = vec![2, 0, 0, 0, 0, to.0, 2, 0, 0, 0, 0, from.0, 8, 0];
            let length = u16::try_from(40 + piece.len()).expect("small");
            frame.extend([0x45, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, from.0, 10, 0, 0, to.0]);
            frame.extend(from.1.to_be_bytes());
            frame.extend(to.1.to_be_bytes());
            frame.extend((*sequence + 1).to_be_bytes());
            frame.extend((acknowledged + 1).to_be_bytes());
            frame.extend([0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
            frame.extend(piece);
            *sequence += u32::try_from(piece.len()).expect("small");
            let length = u32::try_from(frame.len()).expect("small");
            let seconds = u32::try_from(at.as_secs()).expect("short");
            for word in [seconds, at.subsec_micros(), length, length] {
                pcap.extend(u32::to_be_bytes(word));
            }
            pcap.extend(frame);
        }
    }
    fs::write(out, pcap).expect("written");
}

#[test]
fn a_migration_is_dissected_from_the_first_byte_to_the_last() {
    if Command::new("tshark").arg("--version").output().is_err() {
        multifd_testkit::lacks("tshark is not installed");
        return;
    }
    let folder = folder();
    let (recording, bytes) = recording_of_two_channels(&folder);
    let pcap = path(&folder, "capture.pcap");
    capture(&recording, &pcap);
    let fields =
        ["machine", "channel", "packet.normal", "packet.zero", "record", "command", "reply", "value"];
    let mut tshark = Command::new("tshark");
    tshark.arg("-X").arg(format!("lua_script:{}", script().display())).arg("-r").arg(&pcap);
    tshark.args(["-Y", "multifd", "-T", "fields", "-E", "separator=;", "-e", "multifd.malformed"]);
    for field in fields {
        tshark.args(["-e", &format!("multifd.{field}")]);
    }
    let output = tshark.output().expect("run");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && !errors.contains("Lua"), "{errors}");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(';').collect()).collect();
    let of = |index: usize| {
        let cells = lines.iter().filter_map(move |line| line.get(index + 1).copied());
        cells.flat_map(|cell| cell.split(',')).filter(|cell| !cell.is_empty()).collect::<Vec<_>>()
    };
    assert!(lines.iter().all(|line| line[0].is_empty()), "{text}");
    assert_eq!(of(0), ["pc-q35-10.0"]);
    let mut channels = of(1);
    channels.sort_unstable();
    channels.dedup();
    assert_eq!(channels, ["0", "1"]);
    let sum = |index| of(index).iter().map(|cell| cell.parse::<u64>().expect("a number")).sum::<u64>();
    let zero_on_main = of(4).iter().filter(|flag| **flag == "0x0002").count() as u64;
    assert_eq!(sum(2) + sum(3) + zero_on_main, bytes >> 12, "{text}");
    assert!(of(4).contains(&"0x0004") && of(4).contains(&"0x0010"), "{text}");
    assert!(of(5).contains(&"1") && of(5).contains(&"2"), "{text}");
    // PONG, and at the end SHUT 0.
    assert_eq!((of(6).first(), of(6).last()), (Some(&"2"), Some(&"1")), "{text}");
}
