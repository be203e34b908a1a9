//! The memory that a peer or a file can make the program take: what came counts, not what was announced.

use std::{
    fs,
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    time::Duration,
};

use multifd::ram::{BlockName, PageSize};
use multifd_testkit::bad_source::{Act, HEAD, Heard, On, PAGE, Script, Shape, Target, packet};
use qemu_stream::{
    format::{BlockEntry, BlockList, Configuration, DevicePart, MachineType, SectionId},
    mapped_ram::{Layout, Tail},
};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::kit::{Program, assert_left, folder, multifd, path, run};

const LOCAL: &str = "tcp:127.0.0.1:0";
/// More than the program takes for itself, in KiB: about 15 MiB.
const ITSELF: u64 = 48 << 10;
/// As much as a file of `ext4` may have.
const RAM: u64 = 15 << 40;

/// A machine of 15 TiB, of which one page is present.
fn sparse(folder: &TempDir) -> Option<PathBuf> {
    let path = path(folder, "sparse");
    let file = File::create_new(&path).expect("a new file");
    let configuration = Configuration::new(MachineType::new("pc-q35-10.0").expect("a name"));
    let entry = BlockEntry::new(BlockName::new("pc.ram").expect("a name"), RAM);
    let blocks = BlockList::new(vec![entry], PageSize::KIB_4).expect("a list");
    let layout = Layout::new(&configuration, &blocks, SectionId(1), 0).expect("a layout");
    if file.set_len(layout.tail_offset()).is_err() {
        multifd_testkit::lacks("the file system of temporary files allows no file of 15 TiB");
        return None;
    }
    let devices = DevicePart::build(&[], 4096, SectionId(2)).expect("devices");
    let tail = Tail { switchover_start: true, devices: &devices, about: None, base: None };
    let words = layout.places()[0].bitmap_words();
    let words = usize::try_from(words).expect("the words are counted in memory");
    let present = |word: usize| if word == 1 << 20 { 1 } else { 0 };
    layout.write(&file, &tail, |_, _| (0..words).map(present)).expect("written");
    file.write_all_at(&[7; PAGE], layout.places()[0].pages_offset + (64 << 20) * PAGE as u64)
        .expect("a page");
    Some(path)
}

#[test]
fn sparse_file_of_15_tib_is_read_with_the_memory_of_its_pages() {
    let folder = folder();
    let Some(file) = sparse(&folder) else { return };
    assert!(fs::metadata(&file).unwrap().blocks() * 512 <= 256 << 10, "on the disk, too");
    let file = file.to_str().unwrap();
    let shown = Program::start(&mut multifd(["inspect", file])).done();
    assert!(shown.stdout.contains("15.00 TiB in 1 blocks, 4.00 KiB present"), "{shown:?}");
    let out = path(&folder, "out");
    let extracted =
        Program::start(&mut multifd(["inspect", "--extract", "pc.ram", file, out.to_str().unwrap()])).done();
    assert!(fs::metadata(&out).unwrap().blocks() * 512 <= 64 << 10);
    // Its destination never answers, and its pages are zero: it is interrupted on its way.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap());
    let sending = Program::start(&mut multifd(["send", "--multifd-channels", "0", file, &address]));
    let (mut main, _) = listener.accept().unwrap();
    std::io::copy(&mut std::io::Read::take(&mut main, 16 << 20), &mut std::io::sink()).unwrap();
    sending.signal(Signal::INT);
    let sent = sending.end();
    assert_eq!(sent.code, Some(130), "{sent:?}");
    for (what, ended) in [("inspect", &shown), ("extract", &extracted), ("send", &sent)] {
        assert!(ended.peak > 0 && ended.peak <= ITSELF, "{what}: {} KiB resident", ended.peak);
    }
}

/// A main stream with one zero page of 15 TiB.
fn announces_terabytes() -> Vec<u8> {
    let json = br#"{"page_size": 4096, "devices": []}"#;
    let mut bytes =
        b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    bytes.extend((RAM | 4).to_be_bytes());
    bytes.extend(b"\x06pc.ram");
    bytes.extend(RAM.to_be_bytes());
    let eos = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";
    bytes.extend(eos);
    bytes.extend(b"\x03\0\0\0\x01\0\0\0\0\0\0\0\x02\x06pc.ram\0");
    bytes.extend(eos);
    bytes.extend(b"\0\x06");
    bytes.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
    bytes.extend(json);
    bytes
}

/// 293 bytes once cost 1.4 GiB of memory and 480 MiB of disk.
#[test]
fn source_that_announces_15_tib_and_sends_a_zero_page_costs_neither_memory_nor_disk() {
    let folder = folder();
    if sparse(&folder).is_none() {
        return;
    }
    fs::remove_file(path(&folder, "sparse")).unwrap();
    let file = path(&folder, "machine");
    let (mut receive, address) = Program::receive(&["--missing-pages", "zero", "--quiet"], LOCAL, &file);
    receive.await_resident(1);
    let mut main = std::net::TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    std::io::Write::write_all(&mut main, &announces_terabytes()).unwrap();
    main.shutdown(std::net::Shutdown::Write).unwrap();
    let ended = receive.done();
    assert!(ended.peak > 0 && ended.peak <= ITSELF, "{} KiB resident", ended.peak);
    assert!(fs::metadata(&file).unwrap().blocks() * 512 <= 64 << 10);
    let shown = run(["inspect", file.to_str().unwrap()]);
    assert!(shown.stdout.contains("15.00 TiB in 1 blocks, 0 B present"), "{shown:?}");
}

/// Packets of one channel, each with 16 pages of one byte, in a frame that keeps a window of 2^`log` bytes.
fn compressed(log: u8, packets: usize) -> Vec<u8> {
    let pages: Vec<u64> = (0..16).collect();
    let bytes = u32::try_from(16 * PAGE).unwrap();
    let mut all = Vec::new();
    for number in 0..packets {
        let head = [0x28, 0xb5, 0x2f, 0xfd, 0x00, (log - 10) << 3];
        // A block that repeats one byte: not the last one, its kind, its size, in three little-endian bytes.
        let [_, high, middle, low] = (bytes << 3 | 1 << 1).to_be_bytes();
        let payload = [if number == 0 { &head[..] } else { &[] }, &[low, middle, high, 7]].concat();
        let mut packet = packet("pc.ram", &pages, 1);
        packet.truncate(HEAD);
        packet[8..12].copy_from_slice(&4_u32.to_be_bytes());
        packet[20..24].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
        all.extend(packet);
        all.extend(payload);
    }
    all
}

/// What `receive` says to a source of `channels` channels that fill their windows. The source ends only when that has
/// taken `least` KiB of memory, or has failed.
fn filled_windows(options: &[&str], channels: u8, log: u8, least: u64) -> crate::kit::Ended {
    let folder = folder();
    let (mut receive, address) = Program::receive(options, LOCAL, &path(&folder, "machine"));
    let mut script = Script::whole(Shape { channels, return_path: false, round: true });
    let packets = (1 << log) / (16 * PAGE) + 8;
    for id in 0..channels {
        script = script.replace(On::Channel(id), "pages", 0, Act::Send(compressed(log, packets)));
    }
    // The second pass of channel 0 is like the first.
    let again = compressed(log, 2)[HEAD + 10..].to_vec();
    let script = script.replace(On::Channel(0), "pages", 1, Act::Send(again));
    let target = Target::Tcp(address.strip_prefix("tcp:").unwrap().parse().unwrap());
    let last = script.find(On::Main, "end", 0);
    let mut heard = Heard::default();
    heard.play(&script.steps[..last], &target).unwrap();
    receive.await_resident(least);
    heard.play(&script.steps[last..], &target).unwrap();
    let ended = receive.end_within(Duration::from_secs(60));
    drop(heard);
    if ended.code != Some(0) {
        assert_left(&folder, &[]);
    }
    ended
}

/// Eight channels with windows of 128 MiB once took a gigabyte.
#[test]
fn windows_of_all_channels_together_stay_within_the_limit() {
    let ended = filled_windows(&["--quiet", "--decompression-memory", "64M"], 8, 25, 1);
    let told = [
        "decompression of all channels needs 96 MiB (32 MiB for this channel), but decompression-memory is 64 MiB on this side",
        "decrease multifd-zstd-level or multifd-channels at the source",
    ];
    ended.assert_failed(1, &told);
    assert!(ended.peak > 0 && ended.peak <= ITSELF + (64 << 10) + (16 << 10), "{} KiB resident", ended.peak);
}

#[test]
fn window_that_no_level_asks_for_is_refused() {
    let ended = filled_windows(&["--quiet"], 1, 26, 1);
    ended.assert_failed(
        1,
        &["zstd frame needs a window of 64 MiB, expected at most 32 MiB", "multifd-zstd-level to 20 or less"],
    );
    assert!(ended.peak <= ITSELF, "{} KiB resident", ended.peak);
}

#[test]
fn windows_up_to_the_limit_are_taken() {
    for limit in ["64M", "0"] {
        // It shows that the windows are filled, so that the test of the limit tests something.
        let ended = filled_windows(&["--quiet", "--decompression-memory", limit], 2, 25, 64 << 10);
        assert_eq!(ended.code, Some(0), "{limit}: {ended:?}");
        assert!(ended.peak >= 64 << 10, "{} KiB resident", ended.peak);
    }
}
