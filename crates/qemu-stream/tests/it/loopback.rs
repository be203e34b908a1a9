//! One driver reads what the other writes.

use std::{thread, time::Duration};

use multifd::{
    Synced,
    ram::{BlockIndex, BlockName, PageIndex, PageSize},
    wire::VmUuid,
};
use qemu_stream::{
    error::{Error, Usage},
    format::{BlockEntry, BlockList, Command, Configuration, MachineType, SectionId, SyncMode},
    incoming::{Incoming, Loaded, Outcome},
    outgoing::{Options, Outgoing},
};

use crate::kit::{
    Memory, Tape, all_options, blocks, cause, complete, devices, devices_of, devices_without_footers, pair,
    q35, send, stream, synced,
};

/// Sends with `options` from a separate thread; both ends must succeed.
fn migrate(options: Options) -> (Loaded, Memory) {
    let (source, destination) = pair();
    let multifd = options != options.clone().sync_mode(None);
    let sent = thread::spawn(move || {
        let mut out = Outgoing::new(source, options).unwrap();
        send(&mut out, multifd).unwrap();
        complete(&mut out, Some(Duration::from_secs(30))).unwrap();
    });
    let mut memory = Memory::default();
    let mut incoming = Incoming::new(destination);
    let loaded = incoming.run(&mut memory).unwrap();
    incoming.finish(Outcome::Loaded).unwrap();
    sent.join().unwrap();
    (loaded, memory)
}

#[test]
fn a_machine_arrives_in_every_way_to_write_it() {
    for options in all_options() {
        let (loaded, memory) = migrate(options.clone());
        assert_eq!(loaded.blocks, blocks(), "{options:?}");
        assert_eq!(loaded.devices, devices_of(&options));
        assert_eq!(loaded.section, SectionId(1));
        assert_eq!(memory.pages[&(0, 3)], [0; 4096]);
        assert_eq!(memory.pages[&(1, 0)], [0; 4096]);
        // Set-up, one pass, the last pass: in both modes each has one sync point.
        assert_eq!(memory.syncs(), 3, "{options:?}");
        assert_eq!(memory.calls.last(), Some(&"end_of_ram"));
    }
}

#[test]
fn the_sync_mode_is_recognised() {
    for mode in [SyncMode::Legacy, SyncMode::Round] {
        let (loaded, _) = migrate(Options::new(q35("10.0")).sync_mode(Some(mode)));
        assert_eq!(loaded.sync_mode, mode);
    }
}

#[test]
fn what_the_machine_type_decides_is_on_the_wire() {
    let (old, _) = migrate(Options::new(q35("7.2")));
    assert_eq!((old.sync_mode, old.switchover_start, old.footers), (SyncMode::Legacy, false, true));
    let (new, _) = migrate(Options::new(q35("10.0")).unconfirmed());
    assert_eq!((new.sync_mode, new.switchover_start, new.return_path), (SyncMode::Round, true, false));
    let (ancient, _) = migrate(Options::without_configuration());
    assert_eq!((ancient.configuration, ancient.footers), (None, false));
}

#[test]
fn pages_of_a_source_with_multifd_off_come_over_main() {
    let (_, memory) = migrate(Options::new(q35("10.0")).sync_mode(None));
    assert_eq!(memory.pages[&(0, 4)], [7; 4096]);
    assert_eq!(memory.pages[&(1, 1)], [8; 4096]);
}

/// Captured from QEMU 10.0.2, pc-q35-10.0 with UUID and return path; its block list shortened to
/// pc.ram, and of the two scans that ended in END only one.
#[test]
fn the_stream_is_what_qemu_writes() {
    let uuid: VmUuid = "00112233-4455-6677-8899-aabbccddeeff".parse().unwrap();
    let mut out =
        Outgoing::new(Tape::default(), Options::new(Configuration { uuid: Some(uuid), ..q35("10.0") }))
            .unwrap();
    let ram = BlockEntry::new(BlockName::new("pc.ram").unwrap(), 96 << 20);
    out.begin(2).unwrap();
    out.setup(BlockList::new(vec![ram], PageSize::KIB_4).unwrap(), synced()).unwrap();
    out.begin_part().unwrap();
    out.end_part(synced()).unwrap();
    out.switchover().unwrap();
    out.begin_end().unwrap();
    out.end_part(synced()).unwrap();
    let golden: &[&[u8]] = &[
        b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0",
        b"\x05\x12configuration/uuid\0\0\0\x01",
        &uuid.0,
        b"\x08\0\x01\0\0",
        b"\x08\0\x02\0\x04\0\0\0\x01",
        // QEMU does not write these commands: a reason is understood, and there are two channels.
        b"\x08\0\x02\0\x04mfg\x01",
        b"\x08\0\x02\0\x04mfd\x02",
        b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04",
        b"\0\0\0\0\x06\0\0\x04\x06pc.ram\0\0\0\0\x06\0\0\0",
        b"\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01",
        b"\x02\0\0\0\x01\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01",
        b"\x08\0\x0b\0\0",
        b"\x03\0\0\0\x01\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01",
    ];
    assert_eq!(out.into_inner().output, golden.concat());
}

#[test]
fn the_number_of_channels_is_announced_where_there_is_a_return_path() {
    for options in all_options() {
        let mut memory = Memory::default();
        Incoming::new(Tape::playing(&stream(options.clone()))).run(&mut memory).unwrap();
        let channels = if options.chosen_sync_mode().is_some() { 2 } else { 0 };
        let return_path = options != options.clone().unconfirmed();
        assert_eq!(memory.announced, return_path.then_some(channels), "{options:?}");
    }
}

#[test]
fn only_the_exact_mark_announces_channels() {
    let announced = |value| Command::Ping(value).announced_channels();
    for channels in [0, 1, 255] {
        assert_eq!(Command::announce_channels(channels).announced_channels(), Some(channels));
    }
    assert_eq!(announced(0x6d66_6410), Some(16));
    for value in [0, 1, 0x42, 0x6d66_6300, 0x6d66_6501, 0xed66_6401, 0x6466_6d01] {
        assert_eq!(announced(value), None, "{value:#x}");
    }
}

#[test]
fn a_number_of_channels_that_contradicts_the_sync_mode_is_refused() {
    for (mode, channels) in [(None, 2), (Some(SyncMode::Round), 0)] {
        let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0")).sync_mode(mode)).unwrap();
        assert!(matches!(out.begin(channels), Err(Error::Usage(Usage::Value { .. }))));
    }
}

/// The destination's channels wait until the record of a sync point arrives.
#[test]
fn nothing_is_kept_back_at_a_sync_point() {
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0"))).unwrap();
    let ends_with_footer = |out: Outgoing<Tape>| out.into_inner().output.ends_with(b"\x10\x7e\0\0\0\x01");
    out.begin(2).unwrap();
    out.setup(blocks(), synced()).unwrap();
    assert!(ends_with_footer(out));
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("7.2"))).unwrap();
    out.begin(2).unwrap();
    out.setup(blocks(), synced()).unwrap();
    out.begin_part().unwrap();
    out.zero_page(BlockIndex(0), PageIndex(0)).unwrap();
    out.end_part(synced()).unwrap();
    assert!(ends_with_footer(out));
}

/// A destination waits at the record for the announced number of channels.
#[test]
fn a_sync_point_without_its_syncs_is_refused() {
    let refused = |result: Result<(), Error>| {
        let error = result.expect_err("refused").to_string();
        assert!(error.contains("sync point") && error.contains("announced"), "{error}");
    };
    for (channels, wrong) in [(2, None), (2, Some(3)), (0, Some(2))] {
        let options = Options::new(q35("10.0"));
        let options = if channels == 0 { options.sync_mode(None) } else { options };
        let mut out = Outgoing::new(Tape::default(), options).unwrap();
        let right = || (channels > 0).then(|| Synced::asserted(channels));
        let wrong = || wrong.map(Synced::asserted);
        out.begin(channels).unwrap();
        refused(out.setup(blocks(), wrong()));
        out.setup(blocks(), right()).unwrap();
        out.begin_end().unwrap();
        refused(out.end_part(wrong()));
        out.end_part(right()).unwrap();
    }
}

#[test]
fn many_pages_do_not_gather_without_bound() {
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0")).sync_mode(None)).unwrap();
    out.begin(0).unwrap();
    out.setup(blocks(), None).unwrap();
    out.begin_part().unwrap();
    for page in 0..0x100 {
        out.page(BlockIndex(0), PageIndex(page), &[1; 4096]).unwrap();
    }
    assert!(out.into_inner().output.len() > 700 << 10);
}

#[test]
fn a_file_s_configuration_is_sent_as_a_connection_s() {
    let (loaded, _) = migrate(Options::new(Configuration { mapped_ram: true, ..q35("10.0") }));
    assert_eq!(loaded.configuration, Some(q35("10.0")));
}

#[test]
fn shared_ram_is_listed_with_its_address() {
    let configuration = Configuration { ignore_shared: true, ..q35("10.0") };
    let (loaded, _) = migrate(Options::new(configuration));
    assert!(loaded.blocks.entries().iter().all(|entry| entry.address == Some(0)));
}

#[test]
fn calls_out_of_order_are_refused_and_harmless() {
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0"))).unwrap();
    let out_of_order = |result| matches!(result, Err(Error::Usage(Usage::OutOfOrder { .. })));
    assert!(out_of_order(out.setup(blocks(), synced())));
    assert!(out_of_order(out.begin_part()));
    out.begin(2).unwrap();
    assert!(out_of_order(out.begin(2)));
    assert!(out_of_order(out.begin_part()));
    out.setup(blocks(), synced()).unwrap();
    assert!(out_of_order(out.zero_page(BlockIndex(0), PageIndex(0))));
    assert!(out_of_order(out.end_part(synced())));
    out.begin_part().unwrap();
    assert!(out_of_order(out.page(BlockIndex(0), PageIndex(0), &[0; 4096])), "multifd is on");
    assert!(out_of_order(out.switchover()));
    assert!(out.zero_page(BlockIndex(0), PageIndex(0x100)).is_err());
    out.end_part(synced()).unwrap();
    assert!(out_of_order(out.devices(&devices())));
    out.switchover().unwrap();
    out.begin_end().unwrap();
    out.end_part(synced()).unwrap();
    assert!(out_of_order(out.begin_part()));
    let early = complete(&mut out, None).unwrap_err();
    assert!(matches!(cause(&early), Error::Usage(Usage::OutOfOrder { .. })));
    let other = out.devices(&devices_without_footers());
    assert!(matches!(other, Err(Error::Usage(Usage::Value { .. }))));
    out.devices(&devices()).unwrap();
    assert!(out_of_order(out.devices(&devices())));
    let mut memory = Memory::default();
    let output = out.into_inner().output;
    assert!(Incoming::new(Tape::playing(&output)).run(&mut memory).is_ok());
}

/// Regression: a destination finds the section of a piece by its number, and used the device's for RAM's.
#[test]
fn device_with_the_number_of_the_ram_section_is_refused() {
    for (ram, taken) in [(SectionId(1), None), (SectionId(3), Some("vcpu")), (SectionId(2), Some("timer"))] {
        let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0")).section(ram)).unwrap();
        out.begin(2).unwrap();
        out.setup(blocks(), synced()).unwrap();
        assert_eq!(out.early(&devices()).is_err(), taken.is_some(), "nothing of it goes anywhere");
        out.switchover().unwrap();
        out.begin_end().unwrap();
        out.end_part(synced()).unwrap();
        match (out.devices(&devices()), taken) {
            (Ok(()), None) => {}
            (Err(Error::Usage(Usage::SectionTaken { section, device })), Some(name)) => {
                assert_eq!((section, device.as_bytes()), (ram, name.as_bytes()));
            }
            (found, _) => panic!("{found:?}"),
        }
    }
}

#[test]
fn options_that_contradict_the_machine_type_are_refused() {
    let old = Options::new(Configuration::new(MachineType::new("pc-i440fx-2.3").unwrap()));
    assert!(matches!(Outgoing::new(Tape::default(), old), Err(Usage::Machine { .. })));
    let arm = Configuration { target_page_size: Some(PageSize::KIB_64), ..q35("10.0") };
    let mut out = Outgoing::new(Tape::default(), Options::new(arm)).unwrap();
    out.begin(2).unwrap();
    assert!(matches!(out.setup(blocks(), synced()), Err(Error::Usage(Usage::Value { .. }))));
}

#[test]
fn a_stream_on_tape_reads_back() {
    for options in all_options() {
        let mut incoming = Incoming::new(Tape::playing(&stream(options)));
        let loaded = incoming.run(&mut Memory::default()).unwrap();
        assert_eq!(loaded.bytes, incoming.bytes());
    }
}
