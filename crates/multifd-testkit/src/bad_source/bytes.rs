//! The bytes of a correct migration, made only from the description of the format.

/// The page size of every script.
pub const PAGE: usize = 4096;
/// The bytes of a packet's head for such pages.
pub const HEAD: usize = 320 + 8 * 128;

/// The blocks of every script: name and length. The first block's even pages go over channel 0, its odd ones over the
/// next.
pub const BLOCKS: [(&str, u64); 2] = [("pc.ram", 16 * PAGE as u64), ("pc.rom", 2 * PAGE as u64)];
/// The only device's state.
pub const DEVICE: [u8; 24] = [7; 24];

const MAGIC: [u8; 4] = [0x11, 0x22, 0x33, 0x44];
const RAM: [u8; 4] = [0, 0, 0, 1];

pub(super) fn initial(id: u8) -> Vec<u8> {
    let mut bytes = [MAGIC, [0, 0, 0, 1]].concat();
    bytes.extend([0; 16]);
    bytes.push(id);
    bytes.resize(64, 0);
    bytes
}

/// The contents of a page in a version.
pub fn page_of(page: u64, version: u8) -> Vec<u8> {
    let word = [&[version; 4][..], &(page + 1).to_be_bytes()[4..]].concat();
    word.repeat(PAGE / 8)
}

/// A packet with pages of a block, each with the contents of [`page_of`].
pub fn packet(block: &str, pages: &[u64], version: u8) -> Vec<u8> {
    let count = u32::try_from(pages.len()).expect("few").to_be_bytes();
    let payload = u32::try_from(pages.len() * PAGE).expect("little").to_be_bytes();
    let mut bytes = [MAGIC, [0, 0, 0, 1], [0; 4], 128_u32.to_be_bytes(), count, payload].concat();
    bytes.resize(64, 0);
    bytes.extend(block.as_bytes());
    bytes.resize(320, 0);
    for page in pages {
        bytes.extend((page * PAGE as u64).to_be_bytes());
    }
    bytes.resize(HEAD, 0);
    for page in pages {
        bytes.extend(page_of(*page, version));
    }
    bytes
}

/// A SYNC packet.
pub fn sync() -> Vec<u8> {
    let mut bytes = [MAGIC, [0, 0, 0, 1], [0, 0, 0, 1]].concat();
    bytes.resize(HEAD, 0);
    bytes
}

pub(super) fn header() -> Vec<u8> {
    let machine = b"pc-q35-10.0";
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0".to_vec();
    bytes.push(u8::try_from(machine.len()).expect("short"));
    bytes.extend(machine);
    bytes
}

/// OPEN_RETURN_PATH and a PING.
pub(super) fn return_path() -> Vec<u8> {
    b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01".to_vec()
}

/// The list of blocks, in one section.
pub(super) fn start(round: bool) -> Vec<u8> {
    let mut bytes = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    let total: u64 = BLOCKS.iter().map(|(_, length)| length).sum();
    bytes.extend((total | 4).to_be_bytes());
    for (name, length) in BLOCKS {
        bytes.push(u8::try_from(name.len()).expect("short"));
        bytes.extend(name.as_bytes());
        bytes.extend(length.to_be_bytes());
    }
    body_end(bytes, round)
}

pub(super) fn part(round: bool) -> Vec<u8> {
    body_end([&[2][..], &RAM].concat(), round)
}

/// The last section, with the pages of the second block, which are zero.
pub(super) fn end(round: bool) -> Vec<u8> {
    let (name, length) = BLOCKS[1];
    let mut bytes = [&[3][..], &RAM].concat();
    bytes.extend(0x2_u64.to_be_bytes());
    bytes.push(u8::try_from(name.len()).expect("short"));
    bytes.extend(name.as_bytes());
    bytes.push(0);
    for page in 1..length / PAGE as u64 {
        bytes.extend(((page * PAGE as u64) | 0x22).to_be_bytes());
        bytes.push(0);
    }
    body_end(bytes, round)
}

fn body_end(mut bytes: Vec<u8>, round: bool) -> Vec<u8> {
    if round {
        bytes.extend(0x200_u64.to_be_bytes());
    }
    bytes.extend(0x10_u64.to_be_bytes());
    bytes.push(0x7e);
    bytes.extend(RAM);
    bytes
}

/// A device and its description.
pub(super) fn devices() -> Vec<u8> {
    let json = br#"{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [{"name": "all", "type": "buffer", "size": 24}]}]}"#;
    let mut bytes = b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02".to_vec();
    bytes.extend(DEVICE);
    bytes.extend(b"\x7e\0\0\0\x02\0\x06");
    bytes.extend(u32::try_from(json.len()).expect("short").to_be_bytes());
    bytes.extend(json);
    bytes
}
