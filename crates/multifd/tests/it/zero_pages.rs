//! Zero pages: which side detects them, how they are sent, and what they leave untouched.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc, time::Duration};

use multifd::{
    Method, SendOptions, Sender,
    channel::{Link, Listen, Stop, memory},
    live::{MigrateOptions, MigrationInfo, ZeroPageDetection},
    ram::{
        BlockIndex, Memory, NeverDirty, PageBitmap, PageIndex, PageSize, PartMut, Places, RamBlock, RamBlocks,
    },
    wire::{Packet, head_len},
};

use crate::kit::{StoppedGuest, context, difference, fresh, migrate, migrate_with, name, write};

const MODES: [ZeroPageDetection; 3] =
    [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd];

/// A machine moves to `destination`, complete.
fn moves(
    source: &Arc<RamBlocks>,
    destination: &Arc<RamBlocks>,
    channels: u8,
    options: MigrateOptions,
) -> MigrationInfo {
    let outcome =
        migrate(source, destination, channels, options, &mut NeverDirty, &mut StoppedGuest::default());
    let (sent, received) = (outcome.sent.expect("sent"), outcome.received.expect("received"));
    assert_eq!(sent.channels, received, "both sides have counted the same");
    sent
}

fn on_channels(info: &MigrationInfo) -> u64 {
    info.channels.iter().map(|channel| channel.zero).sum()
}

/// The number of pages of a block's memory that the system has allocated, except for 2 MiB at both ends, which may
/// share a huge page with adjacent memory.
fn populated(block: &RamBlock) -> usize {
    let memory = block.slice(PageIndex(512), block.pages() - 1024).expect("mapped");
    let page = PageSize::KIB_4.bytes();
    let mut entries = vec![0; memory.len() / page * ENTRY];
    let pagemap = File::open("/proc/self/pagemap").expect("the system's table");
    let at = memory.as_ptr().addr() / page * ENTRY;
    pagemap.read_exact_at(&mut entries, at as u64).expect("read");
    entries.chunks_exact(ENTRY).filter(|entry| entry[ENTRY - 1] & 0x80 != 0).count()
}

/// The length of a page's entry in `/proc/self/pagemap`, in host order: the top bit says that there is memory.
const ENTRY: usize = 8;
const _: () = assert!(cfg!(target_endian = "little"), "the last byte is the top one");

/// A kernel before 6.7 does not report touched pages, so all pages are read, which allocates them.
#[test]
fn source_memory_that_nobody_has_touched_stays_untouched() {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("told");
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let tells = (numbers.next(), numbers.next()) >= (Some(6), Some(7));
    for mode in [ZeroPageDetection::Multifd, ZeroPageDetection::Legacy] {
        for look in [true, false] {
            let blocks = &[("ram", 16 << 20)];
            let (source, destination) = (fresh(PageSize::KIB_4, blocks), fresh(PageSize::KIB_4, blocks));
            write(&source, 0, 0, 7);
            let options = MigrateOptions::new().zero_page_detection(mode).look_for_zero_pages(look);
            let sent = moves(&source, &destination, 3, options);
            let expected = if tells { 0 } else { 3072 };
            let block = source.get(BlockIndex(0)).expect("there");
            assert_eq!(populated(block), expected, "{mode:?}, look {look}");
            // What is known without reading counts, whether pages are read or not. The page may be in a huge page.
            let most = match (look, tells) {
                (true, _) => 1,
                (false, true) => 512,
                (false, false) => 4096,
            };
            assert!((1..=most).contains(&sent.ram.normal), "{mode:?}, look {look}: {}", sent.ram.normal);
            assert_eq!(sent.ram.normal + sent.ram.duplicate, 4096, "{mode:?}, look {look}");
            assert_eq!(difference(&source, &destination), None);
        }
    }
}

#[test]
fn fresh_memory_stays_untouched_when_zero_pages_come() {
    const BLOCKS: &[(&str, u64)] = &[("zero", 16 << 20), ("full", 8 << 20)];
    for (mode, channels) in
        [(ZeroPageDetection::Multifd, 3), (ZeroPageDetection::Legacy, 3), (ZeroPageDetection::Legacy, 0)]
    {
        let (source, destination) = (fresh(PageSize::KIB_4, BLOCKS), fresh(PageSize::KIB_4, BLOCKS));
        (0..2048).for_each(|page| write(&source, 1, page, 1));
        let sent = moves(&source, &destination, channels, MigrateOptions::new().zero_page_detection(mode));
        let blocks: Vec<_> = destination.iter().map(|(_, block)| populated(block)).collect();
        assert_eq!(blocks, [0, 1024], "{mode:?} {channels}");
        assert_eq!((sent.ram.normal, sent.ram.duplicate), (2048, 4096), "{mode:?} {channels}");
        assert_eq!(difference(&source, &destination), None);
    }
}

#[test]
fn each_mode_sends_zero_pages_its_own_way() {
    for channels in [0, 4] {
        for mode in MODES {
            for limit in [None, Some(1 << 40)] {
                let blocks = &[("pc.ram", 8 << 20)];
                let (source, destination) = (fresh(PageSize::KIB_4, blocks), fresh(PageSize::KIB_4, blocks));
                (0..2048).filter(|page| page % 4 == 0).for_each(|page| write(&source, 0, page, 1));
                let options = MigrateOptions::new().zero_page_detection(mode).max_bandwidth(limit);
                let sent = moves(&source, &destination, channels, options);
                let zero = if mode == ZeroPageDetection::None { 0 } else { 1536 };
                let what = format!("{mode:?}, {channels} channels, {limit:?}: {sent:?}");
                assert_eq!((sent.ram.normal, sent.ram.duplicate), (2048 - zero, zero), "{what}");
                let expected = if mode == ZeroPageDetection::Multifd && channels > 0 { 1536 } else { 0 };
                assert_eq!(on_channels(&sent), expected, "{what}");
                assert_eq!(difference(&source, &destination), None, "{what}");
            }
        }
    }
}

/// Eight pages of garbage with a bitmap by which only the odd ones are present, as in a mapped-ram file.
fn with_junk() -> Arc<RamBlocks> {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(8 * 4096).and_then(|()| file.write_all_at(&[9; 7 * 4096], 0)).expect("written");
    let present = PageBitmap::new(8);
    for page in [1, 3, 5, 7] {
        present.set_run(PageIndex(page), 1);
    }
    let memory = Memory::MappedRam(Places::new(Arc::new(file), 0, present).map(8 * 4096).expect("mapped"));
    let block = RamBlock::new(name("b"), 8 * 4096, PageSize::KIB_4, memory);
    Arc::new(RamBlocks::new(vec![block.expect("a block")]).expect("one"))
}

#[test]
fn pages_known_to_be_zero_arrive_as_zero_in_every_mode_whatever_their_memory_has() {
    for channels in [0, 2] {
        for method in Method::ALL {
            for mode in MODES {
                for look in [true, false] {
                    let (source, destination) = (with_junk(), fresh(PageSize::KIB_4, &[("b", 8 * 4096)]));
                    (0..8).for_each(|page| write(&destination, 0, page, 0xdead));
                    let options = MigrateOptions::new().zero_page_detection(mode).look_for_zero_pages(look);
                    let send = SendOptions::new().channels(channels.max(1)).method(*method);
                    let guest = &mut StoppedGuest::default();
                    let outcome = migrate_with(
                        &source,
                        &destination,
                        send,
                        channels > 0,
                        options,
                        &mut NeverDirty,
                        guest,
                    );
                    let sent = outcome.sent.expect("sent");
                    outcome.received.expect("received");
                    for page in 0..8 {
                        let mut bytes = [1; 4096];
                        let of = destination.block(BlockIndex(0)).expect("there");
                        of.load(PageIndex(page), &mut bytes).expect("loaded");
                        let zero = page % 2 == 0 || page == 7;
                        assert_eq!(bytes == [0; 4096], zero, "page {page}, {mode:?}, {channels}, {method}");
                    }
                    // Page 7 is present and zero, but a file that another process may truncate is not read.
                    let expected = if mode == ZeroPageDetection::None { 0 } else { 4 };
                    assert_eq!(sent.ram.duplicate, expected, "{mode:?}, {channels}, {look}");
                }
            }
        }
    }
}

#[test]
fn zero_entries_alone_carry_the_method_and_no_payload() {
    for method in Method::ALL {
        let (connector, mut listener) = memory::network(1 << 20);
        let source = fresh(PageSize::KIB_4, &[("pc.ram", 1 << 20)]);
        let options = SendOptions::new().channels(1).method(*method);
        let mut sender = Sender::new(options, source, Stop::new()).expect("a sender");
        sender.set_up(Arc::new(connector)).expect("set up");
        let mut link = listener.accept(&context()).expect("accepted").expect("a connection");
        link.set_recv_timeout(Some(Duration::from_secs(20))).expect("set");
        // One page that is checked by the channel, one that is known before.
        sender.queue_unknown_run(BlockIndex(0), PageIndex(3), 1).expect("queued");
        sender.queue_zero_run(BlockIndex(0), PageIndex(5), 1).expect("queued");
        sender.sync().expect("synced");
        let mut bytes = vec![0; 64 + 2 * head_len(PageSize::KIB_4)];
        take(&mut *link, &mut bytes);
        let (first, second) = bytes[64..].split_at(head_len(PageSize::KIB_4));
        let packet = Packet::decode(first, PageSize::KIB_4).expect("a packet");
        let zero: Vec<_> = packet.zero().map(|page| page.0).collect();
        assert_eq!((packet.normal().len(), packet.payload_len), (0, 0), "{method}");
        assert_eq!(zero, [5, 3], "{method}");
        assert_eq!(first[20..24], [0; 4], "{method}: next_packet_size");
        let bits = match method.as_str() {
            "zlib" => 0x02,
            "zstd" => 0x04,
            _ => 0,
        };
        assert_eq!(packet.flags.0, bits, "{method}");
        // The SYNC follows directly.
        let sync = Packet::decode(second, PageSize::KIB_4).expect("a packet");
        assert!(sync.is_sync() && !sync.lists_pages() && sync.flags.0 == 1, "{method}");
    }
}

fn take(link: &mut dyn Link, bytes: &mut [u8]) {
    let mut at = 0;
    while at < bytes.len() {
        let some = link.recv(&mut [PartMut::from(&mut bytes[at..])]).expect("received");
        assert!(some > 0, "{at} of {} bytes came", bytes.len());
        at += some;
    }
}
