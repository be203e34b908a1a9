//! Compressed pages from end to end: whole machines arrive, and damaged packets are refused with their position.

use std::{fs::File, sync::Arc, time::Duration};

use multifd::{
    Error, Method, ReceiveOptions, Receiver, Result, SendOptions, Sender,
    channel::{Connect, Stop, memory},
    error::{Malformed, Unsupported, Usage, Violation},
    live::{MigrateOptions, Migration, ZeroPageDetection},
    ram::{Access, DirtyBitmaps, Mapping, Memory, NeverDirty, PageIndex, PageSize, RamBlock, RamBlocks},
    wire::{ChannelId, Flags, HeadBuffer, Initial, VmUuid, head_len},
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::{
    changing::{ChangingConnector, answer_over},
    kit::{StoppedGuest, difference, fresh, migrate_with, name},
    loopback::{BLOCKS, Writers, filled},
};

fn packed() -> impl Iterator<Item = Method> {
    Method::ALL.iter().copied().filter(|method| *method != Method::None)
}

#[test]
fn a_machine_arrives_whole_with_every_method_page_size_and_zero_page_mode() {
    for method in packed() {
        for page_size in [PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64] {
            for detection in [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd]
            {
                let (source, destination) = (filled(page_size), fresh(page_size, BLOCKS));
                let send = SendOptions::new().channels(3).method(method).level(method, 6);
                let options = MigrateOptions::new().zero_page_detection(detection);
                let guest = &mut StoppedGuest::default();
                let outcome =
                    migrate_with(&source, &destination, send, true, options, &mut NeverDirty, guest);
                let (sent, received) = (outcome.sent.expect("sent"), outcome.received.expect("received"));
                assert_eq!(difference(&source, &destination), None, "{method} {page_size} {detection:?}");
                assert_eq!(sent.channels, received, "both sides have counted the same");
                let pages = sent.channels.iter().map(|channel| channel.normal).sum::<u64>();
                assert!(sent.ram.multifd_bytes < pages * page_size.bytes() as u64, "it packs: {sent:?}");
            }
        }
    }
}

#[test]
fn pages_that_are_written_while_they_are_packed_arrive_as_they_were_last() {
    for method in packed() {
        let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
        let bits = DirtyBitmaps::new(&source);
        let mut log = bits.reader().expect("alone");
        let mut writers = Writers::start(&source, &bits, 600, Duration::from_micros(20));
        let options = MigrateOptions::new().downtime_limit(Duration::from_millis(2));
        let send = SendOptions::new().channels(4).method(method);
        let outcome = migrate_with(&source, &destination, send, true, options, &mut log, &mut writers);
        let sent = outcome.sent.expect("sent");
        outcome.received.expect("received");
        assert_eq!(difference(&source, &destination), None, "{method}");
        assert!(sent.ram.dirty_sync_count >= 3, "{sent:?}");
    }
}

/// What the destination says when a channel's packet of 64 pages is changed on its way.
fn answer_to(
    method: Method,
    choice: Option<Method>,
    change: fn(&mut Vec<u8>),
) -> (Result<()>, Arc<RamBlocks>) {
    let (connector, listener) = memory::network(1 << 22);
    answer_over((Arc::new(ChangingConnector(connector, change)), Box::new(listener)), method, choice)
}

fn untouched(blocks: &RamBlocks) -> bool {
    blocks.iter().all(|(_, block)| block.slice(PageIndex(0), block.pages()).expect("whole").is_zero())
}

#[test]
fn what_is_broken_on_the_way_is_refused_with_channel_and_packet_and_touches_nothing() {
    type Change = fn(&mut Vec<u8>);
    type Expected = fn(&Error) -> bool;
    let payload = head_len(PageSize::KIB_4);
    assert_eq!(payload, 1344);
    let cases: [(&str, Change, Expected, &str); 6] = [
        (
            "a flipped bit in the stream's head",
            |bytes| bytes[1344] ^= 0x10,
            |error| matches!(error, Error::Malformed(Malformed::Compressed { .. })),
            "channel 0: packet 0: broken ",
        ),
        (
            "a packet cut short",
            |bytes| bytes.truncate(bytes.len() - 10),
            |error| matches!(error, Error::Violation(Violation::Cut { .. })),
            "channel 0: packet 0: the source closed the connection (cancelled, or its process ended) after ",
        ),
        (
            "fewer bytes than pages",
            |bytes| bytes[19] += 1,
            |error| matches!(error, Error::Malformed(Malformed::Inflated { .. })),
            "channel 0: packet 0: the payload decompresses to 262144 bytes, expected 266240",
        ),
        (
            "a bomb",
            |bytes| bytes[19] -= 1,
            |error| matches!(error, Error::Malformed(Malformed::Inflated { .. })),
            "channel 0: packet 0: the payload decompresses to more than 258048 bytes, expected 258048",
        ),
        (
            "a payload of nothing",
            |bytes| bytes[20..24].fill(0),
            |error| matches!(error, Error::Malformed(Malformed::CompressedSize { .. })),
            "channel 0: packet 0: next_packet_size 0 of compressed pages: expected 1 to 1048576",
        ),
        (
            "a payload beyond the bound",
            |bytes| bytes[20..24].copy_from_slice(&[0, 0x10, 0, 1]),
            |error| matches!(error, Error::Malformed(Malformed::CompressedSize { .. })),
            "channel 0: packet 0: next_packet_size 1048577 of compressed pages: expected 1 to 1048576",
        ),
    ];
    for method in packed() {
        for (what, change, expected, text) in cases {
            let (answer, blocks) = answer_to(method, None, change);
            let error = answer.expect_err(what);
            assert!(expected(error.kind()), "{method}, {what}: {error}");
            assert!(error.to_string().starts_with(text), "{method}, {what}: {error}");
            assert!(untouched(&blocks), "{method}, {what}");
        }
    }
}

#[test]
fn a_bit_flipped_anywhere_in_a_payload_never_panics_or_writes_beside_the_pages() {
    for method in packed() {
        for at in (1344_usize..1344 + 400).step_by(7) {
            // A changed bit of data rather than of structure may go unnoticed, because there is no checksum.
            static AT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
            AT.store(at, std::sync::atomic::Ordering::Relaxed);
            let (answer, _) = answer_to(method, None, |bytes| {
                let at = AT.load(std::sync::atomic::Ordering::Relaxed).min(bytes.len() - 1);
                bytes[at] ^= 1 << (at % 8);
            });
            if let Err(error) = answer {
                assert!(error.to_string().starts_with("channel 0: packet 0: "), "{method}: {error}");
            }
        }
    }
}

#[test]
fn another_method_than_the_one_told_is_refused_and_one_that_is_not_built_in_is_named() {
    for method in packed() {
        let (answer, blocks) = answer_to(method, Some(Method::None), |_| {});
        let error = answer.expect_err("refused");
        assert!(matches!(error.kind(), Error::Violation(Violation::Method { .. })), "{error}");
        assert!(error.to_string().ends_with("set multifd-compression to none at the source"), "{error}");
        assert!(untouched(&blocks));
        answer_to(method, Some(method), |_| {}).0.expect("taken");
        let (answer, _) = answer_to(method, None, |bytes| bytes[11] = 0x20);
        let error = answer.expect_err("refused");
        assert!(matches!(error.kind(), Error::Unsupported(Unsupported::Method { .. })), "{error}");
        assert!(
            error.to_string().contains("packet of method qatzip (0x20), which this build does not support"),
            "{error}"
        );
    }
}

/// The destination's result when channels 0 and 1 send these packet heads, one after the other.
fn answer_to_heads(heads: &[(u8, Vec<u8>)]) -> Result<()> {
    let (connector, listener) = memory::network(1 << 16);
    let options = ReceiveOptions::new().channels(multifd::ChannelCount::Exact(2));
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(listener)).expect("listening");
    receiver.set_blocks(fresh(PageSize::KIB_4, &[("pc.ram", 64 << 10)])).expect("set");
    let mut links = [0, 1].map(|id| {
        let mut link = connector.connect(&crate::kit::context()).expect("connected");
        let initial = Initial { uuid: VmUuid::NIL, id: ChannelId(id) }.encode();
        assert_eq!(link.send(&[initial[..].into()]).expect("sent"), initial.len());
        link
    });
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    for (channel, head) in heads {
        let link = &mut links[usize::from(*channel)];
        assert_eq!(link.send(&[head[..].into()]).expect("sent"), head.len());
        // Main waits for the other channel as well, so what follows arrives after this packet.
        for link in &mut links {
            // A destination that has refused the packet may have closed the connection already.
            let _ = link.send(&[buffer.sync(0).into()]);
        }
        receiver.sync()?;
    }
    Ok(())
}

fn zero_entries(flags: Flags) -> Vec<u8> {
    let mut buffer = HeadBuffer::new(PageSize::KIB_4);
    buffer.pages(flags, 0, &name("pc.ram"), &[], &[PageIndex(1), PageIndex(3)], 0).to_vec()
}

#[test]
fn packets_of_zero_entries_alone_name_the_method_and_have_no_payload() {
    for flags in [Flags::ZLIB, Flags::ZSTD, Flags::default()] {
        answer_to_heads(&[(0, zero_entries(flags)), (1, zero_entries(flags)), (0, zero_entries(flags))])
            .expect("taken");
    }
}

#[test]
fn the_first_packet_with_pages_decides_the_method_of_all_channels() {
    for (first, then, told) in [
        (Flags::ZLIB, Flags::ZSTD, "zlib"),
        (Flags::ZSTD, Flags::default(), "zstd"),
        (Flags::default(), Flags::ZLIB, "none"),
    ] {
        for (channel, packet) in [(0, 2), (1, 1)] {
            let error = answer_to_heads(&[(0, zero_entries(first)), (channel, zero_entries(then))])
                .expect_err("refused");
            assert!(matches!(error.kind(), Error::Violation(Violation::Method { .. })), "{error}");
            let text =
                format!("channel {channel}: packet {packet}: expected method {told}, found flags {then}: ");
            assert!(error.to_string().starts_with(&text), "{error}");
        }
    }
}

#[test]
fn levels_outside_of_their_range_are_refused() {
    let blocks = fresh(PageSize::KIB_4, &[("pc.ram", 4096)]);
    let refused = |options| {
        let error = Sender::new(options, blocks.clone(), Stop::new()).expect_err("refused");
        assert!(matches!(error.kind(), Error::Usage(Usage::OutOfRange { .. })), "{error}");
        error.to_string()
    };
    #[cfg(feature = "zlib")]
    assert_eq!(
        refused(SendOptions::new().level(Method::Zlib, 10)),
        "expected multifd-zlib-level 0 to 9, found 10"
    );
    #[cfg(feature = "zstd")]
    assert_eq!(
        refused(SendOptions::new().level(Method::Zstd, 21)),
        "expected multifd-zstd-level 0 to 20, found 21"
    );
    let most =
        |method: &Method| Some((*method, u8::try_from(method.level()?.parameter.most).expect("small")));
    let greatest = Method::ALL.iter().filter_map(most);
    let options = greatest.fold(SendOptions::new(), |options, (method, level)| options.level(method, level));
    Sender::new(options, blocks, Stop::new()).expect("in range");
}

/// A block of a page in a memfd.
fn in_memfd(memfd: &File) -> RamBlock {
    let mapping = Mapping::of_file(memfd, 0, 4096, Access::ReadWrite).expect("mapped");
    RamBlock::new(name("ram"), 4096, PageSize::KIB_4, Memory::Mapped(mapping)).expect("a block")
}

/// Regression: compressing such pages after the truncation ended the process.
#[test]
fn memory_that_may_be_cut_shorter_is_not_packed() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = File::from(memfd_create("guest", flags).expect("a memfd"));
    memfd.set_len(4096).expect("sized");
    let set_up = |block, method| {
        let (connector, _listener) = memory::network(1 << 16);
        let blocks = Arc::new(RamBlocks::new(vec![block]).expect("one"));
        let options = SendOptions::new().method(method);
        Sender::new(options, blocks, Stop::new()).expect("made").set_up(Arc::new(connector))
    };
    for method in packed() {
        let refused = set_up(in_memfd(&memfd), method).expect_err("refused");
        assert!(matches!(refused.kind(), Error::Usage(Usage::MayShrink(block)) if *block == name("ram")));
        assert!(refused.to_string().contains("F_SEAL_SHRINK"), "{refused}");
        assert!(set_up(in_memfd(&memfd).ignored(), method).is_ok(), "its pages are not sent");
    }
    assert!(set_up(in_memfd(&memfd), Method::None).is_ok());
    let over_main = |block| {
        let blocks = Arc::new(RamBlocks::new(vec![block]).expect("one"));
        Migration::over_main(MigrateOptions::new(), blocks, Stop::new())
    };
    let refused = over_main(in_memfd(&memfd)).expect_err("main's pages are copied");
    assert!(matches!(refused.kind(), Error::Usage(Usage::MayShrink(_))), "{refused}");
    let kept = Mapping::of_file(&memfd, 0, 4096, Access::ReadWrite).expect("mapped").never_shrinks();
    let kept = RamBlock::new(name("ram"), 4096, PageSize::KIB_4, Memory::Mapped(kept)).expect("a block");
    assert!(over_main(kept).is_ok());
    fcntl_add_seals(&memfd, SealFlags::SHRINK).expect("sealed");
    for method in packed() {
        assert!(set_up(in_memfd(&memfd), method).is_ok());
    }
}
