//! Calls of the reader with values that nothing fits: an error or an empty result, never a panic.

use qemu_stream::{
    error::StreamKind,
    format::{EndFinder, Reader},
};

#[test]
fn a_reader_takes_any_length() {
    let bytes: Vec<u8> = (0..100).collect();
    for capacity in [0, 1, 64, 4096] {
        let reader = || Reader::with_capacity(&bytes[..], StreamKind::Main, capacity);
        reader().bytes(u64::MAX, u64::MAX, "bytes").expect_err("the stream ends");
        assert!(reader().lend(usize::MAX, "bytes").is_err(), "capacity {capacity}");
        assert!(
            reader()
                .peek_bytes(usize::MAX)
                .is_ok_and(|peeked| peeked.is_none_or(|peeked| peeked.len() <= 100))
        );
        let mut reader = reader();
        reader.consume(usize::MAX);
        assert!(reader.position() <= 100, "capacity {capacity}");
    }
    let _ = EndFinder::new(true).end_before_zeros(&[]);
}
