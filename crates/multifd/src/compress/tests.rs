use proptest::prelude::*;

use super::*;
use crate::{
    error::{Error, Malformed},
    ram::{BlockName, Mapping, Memory, PageIndex, PageSize, RamBlock},
    wire::{
        Flags,
        limits::{PACKET_BYTES, PAYLOAD_BYTES, packet_pages},
    },
};

fn packed() -> impl Iterator<Item = Method> {
    Method::ALL.iter().copied().filter(|method| *method != Method::None)
}

fn block(page_size: PageSize, pages: u64, fill: impl Fn(usize) -> u8) -> (RamBlock, Vec<u8>) {
    let length = pages * page_size.bytes() as u64;
    let memory = Mapping::anonymous(length).expect("memory");
    let bytes: Vec<u8> = (0..usize::try_from(length).expect("small")).map(fill).collect();
    memory.slice(0, bytes.len()).expect("in the mapping").copy_from(&bytes);
    let name = BlockName::new("pc.ram").expect("a name");
    (RamBlock::new(name, length, page_size, Memory::Mapped(memory)).expect("a block"), bytes)
}

/// Bytes that no method makes smaller.
fn noise(at: usize) -> u8 {
    let mut x = at as u64 ^ 0x9e37_79b9_7f4a_7c15;
    for _ in 0..3 {
        x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    (x >> 56) as u8
}

/// As guests have it: a quarter of each page noise, the rest constant.
fn guest_like(at: usize) -> u8 {
    if at % 4096 < 1024 { noise(at) } else { 7 }
}

fn decode(decoder: &mut dyn Decode, payload: &[u8], expected: usize) -> Result<Vec<u8>, Error> {
    let mut room = vec![0; expected + 1];
    let found = decoder.decode(payload, &mut room)?;
    if found != expected {
        return Err(Malformed::Inflated { expected, found }.into());
    }
    room.truncate(expected);
    Ok(room)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn pages_come_back_over_many_packets_of_one_stream(
        packets in prop::collection::vec(prop::collection::vec(0_u64..64, 1..24), 1..12),
        level in 0_u8..=9,
        size in prop::sample::select(vec![PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64]),
    ) {
        for method in packed() {
            let (block, bytes) = block(size, 64, |at| if at % 3 == 0 { noise(at) } else { 7 });
            let mut encoder = method.encoder(at_level(method, level)).expect("made").expect("packs");
            let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
            for pages in &packets {
                let pages: Vec<_> = pages.iter().copied().take(packet_pages(size)).map(PageIndex).collect();
                let payload = encoder.encode(&PacketPages::Mapped(&block, &pages)).expect("packed").to_vec();
                prop_assert!(!payload.is_empty() && payload.len() <= PAYLOAD_BYTES as usize);
                let expected: Vec<u8> = pages
                    .iter()
                    .flat_map(|page| {
                        let start = usize::try_from(page.0).expect("small") * size.bytes();
                        bytes[start..start + size.bytes()].iter().copied()
                    })
                    .collect();
                let found = decode(&mut *decoder, &payload, expected.len()).expect("unpacked");
                prop_assert!(found == expected, "{method}");
            }
        }
    }
}

/// A page as guests have them, the same for the same `kind` and `seed`.
fn page(kind: u8, seed: u64, size: PageSize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut page = vec![0; size.bytes()];
    let half = page.len() / 2;
    match kind {
        // All noise, the beginning, the end, what is around a run; half, beside text.
        0 => random.fill(&mut page),
        1 => random.fill(&mut page[..half / 2]),
        2 => random.fill(&mut page[half..]),
        3 => {
            let from = random.usize(..half);
            random.fill(&mut page);
            page[from..from + half].fill(0xc3);
        }
        4 => {
            page.fill_with(|| random.u8(b'a'..=b'z'));
            random.fill(&mut page[half..]);
        }
        // Zeros and a few words; text; one byte.
        5 => (0..20).for_each(|_| {
            let at = random.usize(..half / 8) * 16;
            page[at..at + 8].copy_from_slice(&(0xffff_8880_0000_0000 | random.u64(..1 << 30)).to_be_bytes());
        }),
        6 => page.chunks_exact_mut(8).for_each(|word| {
            word.copy_from_slice(
                &b"migration guest-RAM channels packets switchover destination"[random.usize(..6) * 8..][..8],
            );
        }),
        _ => page.fill(random.u8(..)),
    }
    page
}

fn at_level(method: Method, level: u8) -> Levels {
    let mut levels = Levels::default();
    levels.set(method, level);
    levels
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn pages_of_every_kind_come_back_in_any_order(
        // Of one kind after the other, some of them pages that were there before.
        stretches in prop::collection::vec((0_u8..8, 0_u64..12, 1_usize..14), 1..40),
        level in 0_u8..=9,
        size in prop::sample::select(vec![PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64]),
    ) {
        let pages: Vec<Vec<u8>> = stretches
            .iter()
            .flat_map(|(kind, seed, count)| (0..*count as u64).map(move |nth| page(*kind, seed + nth, size)))
            .collect();
        for method in packed() {
            let mut encoder = method.encoder(at_level(method, level)).expect("made").expect("packs");
            let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
            for packet in pages.chunks(packet_pages(size) - 1) {
                let bytes = packet.concat();
                let payload = encoder.encode(&PacketPages::Private(&bytes, size)).expect("packed").to_vec();
                prop_assert!(payload.len() < bytes.len() + bytes.len() / 8 + 64);
                prop_assert!(method.as_str() != "zlib" || payload.ends_with(&[0, 0, 0xff, 0xff]));
                let found = decode(&mut *decoder, &payload, bytes.len()).expect("unpacked");
                prop_assert!(found == bytes, "{method}");
            }
        }
    }
}

/// How much is left of 4 MiB of such pages, in thousandths.
fn left(method: Method, level: u8, kinds: &[u8]) -> usize {
    let mut encoder = method.encoder(at_level(method, level)).expect("made").expect("packs");
    let pages: Vec<u8> =
        (0..1024).flat_map(|nth| page(kinds[nth % kinds.len()], nth as u64, PageSize::KIB_4)).collect();
    let packets = pages.chunks(PACKET_BYTES);
    let made: usize = packets
        .map(|bytes| encoder.encode(&PacketPages::Private(bytes, PageSize::KIB_4)).expect("packed").len())
        .sum();
    made * 1000 / pages.len()
}

#[test]
fn noise_does_not_grow_and_runs_are_next_to_nothing() {
    for method in packed() {
        for level in 1..=9 {
            assert!(left(method, level, &[0]) <= 1002, "{method} {level}: noise");
            assert!(left(method, level, &[1]) <= 258, "{method} {level}: a quarter noise");
            assert!(left(method, level, &[2, 3]) <= 510, "{method} {level}: half noise");
        }
    }
}

#[test]
fn noise_between_text_costs_the_text_nothing() {
    for method in packed() {
        let (text, noise) = (left(method, 1, &[6]), left(method, 1, &[0]));
        let mixed = left(method, 1, &[6, 0]);
        assert!(mixed <= (text + noise) / 2 + 10, "{method}: {mixed} of {text} and {noise}");
    }
}

#[cfg(feature = "zlib")]
#[test]
fn text_behind_noise_still_leads_to_the_text_before() {
    let mut random = fastrand::Rng::with_seed(1);
    let text: Vec<u8> = std::iter::repeat_with(|| random.u8(b'a'..=b'z')).take(4096).collect();
    let mut encoder = Method::Zlib.encoder(Levels::default()).expect("made").expect("packs");
    let mut length = |pages: &[&[u8]]| {
        encoder.encode(&PacketPages::Private(&pages.concat(), PageSize::KIB_4)).expect("packed").len()
    };
    let first = length(&[&text]);
    length(&[&page(0, 2, PageSize::KIB_4)]);
    // The same once more, with noise between that fits into the window, and with noise that does not.
    assert!(length(&[&text]) < first / 10);
    let noise: Vec<_> = (10..18).map(|seed| page(0, seed, PageSize::KIB_4)).collect();
    length(&noise.iter().map(Vec::as_slice).collect::<Vec<_>>());
    assert!(length(&[&text]) > first / 2);
}

fn all_pages() -> Vec<PageIndex> {
    (0..packet_pages(PageSize::KIB_4) as u64).map(PageIndex).collect()
}

#[test]
fn a_packet_of_noise_stays_below_the_bound_at_every_level() {
    let (block, bytes) = block(PageSize::KIB_4, 128, noise);
    for method in packed() {
        let levels = if method.as_str() == "zlib" { 0..=9 } else { 0..=20 };
        for level in levels {
            let mut encoder = method.encoder(at_level(method, level)).expect("made").expect("packs");
            let payload =
                encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed").to_vec();
            assert!(payload.len() < PACKET_BYTES + PACKET_BYTES / 8, "{method} {level}: {}", payload.len());
            let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
            assert!(decode(&mut *decoder, &payload, PACKET_BYTES).expect("unpacked") == bytes);
        }
    }
}

#[test]
fn only_the_first_payload_of_a_channel_has_the_formats_head() {
    let (block, _) = block(PageSize::KIB_4, 128, guest_like);
    for method in packed() {
        let mut encoder = method.encoder(Levels::default()).expect("made").expect("packs");
        let head: &[u8] = if method.as_str() == "zlib" { &[0x78] } else { &[0x28, 0xb5, 0x2f, 0xfd] };
        assert!(
            encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed").starts_with(head),
            "{method}"
        );
        let second = encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed");
        assert!(!second.starts_with(head), "{method}");
        assert!(method.as_str() != "zlib" || second.ends_with(&[0, 0, 0xff, 0xff]));
    }
}

#[test]
fn a_packet_alone_is_not_understood_without_those_before_it() {
    let (block, _) = block(PageSize::KIB_4, 128, guest_like);
    for method in packed() {
        let mut encoder = method.encoder(Levels::default()).expect("made").expect("packs");
        encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed");
        let second = encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed").to_vec();
        let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
        let refused = decode(&mut *decoder, &second, PACKET_BYTES).expect_err("refused");
        assert!(matches!(refused, Error::Malformed(Malformed::Compressed { .. })), "{method}: {refused}");
    }
}

#[test]
fn a_cut_payload_makes_too_little() {
    let (block, _) = block(PageSize::KIB_4, 128, guest_like);
    for method in packed() {
        let mut encoder = method.encoder(Levels::default()).expect("made").expect("packs");
        let payload = encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed").to_vec();
        let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
        let refused =
            decode(&mut *decoder, &payload[..payload.len() / 2], PACKET_BYTES).expect_err("refused");
        assert!(
            refused.to_string().ends_with(&format!("bytes, expected {PACKET_BYTES}")),
            "{method}: {refused}"
        );
    }
}

#[test]
fn a_bomb_is_refused_at_the_first_byte_too_many() {
    let (block, _) = block(PageSize::KIB_4, 128, |_| 1);
    for method in packed() {
        let mut encoder = method.encoder(Levels::default()).expect("made").expect("packs");
        // 512 KiB in a payload for one page.
        let payload = encoder.encode(&PacketPages::Mapped(&block, &all_pages())).expect("packed").to_vec();
        let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
        let refused = decode(&mut *decoder, &payload, 4096).expect_err("refused");
        assert_eq!(
            refused.to_string(),
            "the payload decompresses to more than 4096 bytes, expected 4096",
            "{method}"
        );
    }
}

#[cfg(feature = "zlib")]
#[test]
fn a_zlib_stream_that_ends_is_refused() {
    let mut stream = flate2::Compress::new(flate2::Compression::fast(), true);
    let mut payload = vec![0; 1000];
    stream.compress(&[5; 4096], &mut payload, flate2::FlushCompress::Finish).expect("packed");
    payload.truncate(usize::try_from(stream.total_out()).expect("small"));
    let mut decoder = Method::Zlib.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
    let refused = decode(&mut *decoder, &payload, 4096).expect_err("refused");
    assert_eq!(refused.to_string(), "broken zlib data: the stream ends");
}

/// What a fresh decoder of `method` says to `payload` for one page.
fn refusal(method: Method, payload: &[u8]) -> String {
    let mut decoder = method.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
    decode(&mut *decoder, payload, 4096).expect_err("refused").to_string()
}

#[cfg(feature = "zlib")]
#[test]
fn a_zlib_stream_with_a_preset_dictionary_or_of_gzip_or_raw_deflate_is_refused() {
    let empty_block = [0x00, 0x00, 0x00, 0xff, 0xff];
    for (head, why) in [
        (&[0x78, 0xbb, 0, 0, 0, 1][..], "broken zlib data: it needs a dictionary"),
        (&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3], "broken zlib data: incorrect header check"),
        (&[], "broken zlib data: unknown compression method"),
    ] {
        assert_eq!(refusal(Method::Zlib, &[head, &empty_block].concat()), why);
    }
}

#[cfg(feature = "zstd")]
#[test]
fn a_zstd_skippable_frame_a_second_frame_and_a_dictionary_are_refused() {
    let mut second = vec![0; 1000];
    let length = zstd_safe::compress(&mut second[..], &[5; 4096], 1).expect("packed");
    second.truncate(length);
    // A skippable frame of four bytes, then a whole one.
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4];
    assert_eq!(
        refusal(Method::Zstd, &[&skippable[..], &second].concat()),
        "broken zstd data: it does not begin with the head of a frame"
    );
    // An empty frame, then a whole one.
    let empty = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x48, 0x01, 0x00, 0x00];
    assert_eq!(refusal(Method::Zstd, &[&empty[..], &second].concat()), "broken zstd data: the frame ends");
    let with_dictionary = [0x28, 0xb5, 0x2f, 0xfd, 0x01, 0x48, 7, 0x01, 0x00, 0x00];
    assert_eq!(refusal(Method::Zstd, &with_dictionary), "broken zstd data: dictionary mismatch");
}

#[cfg(feature = "zstd")]
#[test]
fn a_zstd_frame_that_ends_or_asks_for_too_large_a_window_is_refused() {
    let mut payload = vec![0; 1000];
    let length = zstd_safe::compress(&mut payload[..], &[5; 4096], 1).expect("packed");
    let mut decoder = Method::Zstd.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
    let refused = decode(&mut *decoder, &payload[..length], 4096).expect_err("refused");
    assert_eq!(refused.to_string(), "broken zstd data: the frame ends");
    // Magic, a head with a window of 2^26 bytes, an empty block.
    let wide = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 16 << 3, 0x01, 0x00, 0x00];
    let mut decoder = Method::Zstd.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
    let refused = decode(&mut *decoder, &wide, 4096).expect_err("refused");
    assert!(refused.to_string().starts_with("the source's zstd frame needs a window of 64 MiB"), "{refused}");
    // A window of 2^25 is the largest.
    let most = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 15 << 3, 0x00, 0x00, 0x00];
    let mut decoder = Method::Zstd.decoder(&DecoderMemory::new(None)).expect("made").expect("packs");
    let refused = decode(&mut *decoder, &most, 4096).expect_err("nothing in it");
    assert_eq!(refused.to_string(), "the payload decompresses to 0 bytes, expected 4096");
}

#[test]
fn what_is_not_built_in_is_named() {
    assert_eq!(
        Method::of(Flags::QPL | Flags::SYNC).expect_err("refused").to_string().split(':').next(),
        Some("packet of method qpl (0x8), which this build does not support")
    );
    for method in Method::ALL {
        assert_eq!(method.as_str().parse::<Method>().expect("known"), *method);
        assert_eq!(Method::of(method.flags()), Ok(*method));
    }
    assert!("qatzip".parse::<Method>().is_err());
}
