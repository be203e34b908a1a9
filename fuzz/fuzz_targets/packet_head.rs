//! A packet head of any page size is read or refused; what is read lists no more pages than a packet holds.
#![no_main]

use multifd::{
    ram::PageSize,
    wire::{DEVICE_STATE_LEN, DeviceState, Packet, head_len, limits::packet_pages},
};
use multifd_fuzz::shown;

multifd_fuzz::target!(|bytes: &[u8]| {
    let state = bytes.first_chunk::<DEVICE_STATE_LEN>().map(DeviceState::decode);
    if let Some(state) = state.and_then(shown) {
        assert!(state.payload_len > 0 && !state.device.as_bytes().is_empty());
    }
    for page_size in [PageSize::KIB_4, PageSize::KIB_16, PageSize::KIB_64] {
        let mut head = bytes.to_vec();
        head.resize(head_len(page_size), 0);
        if let Some(packet) = shown(Packet::decode(&head, page_size)) {
            assert!(packet.normal().len() + packet.zero().len() <= packet_pages(page_size));
            assert!(packet.normal().chain(packet.zero()).all(|page| page_size.offset_of(page).is_some()));
        }
    }
});
