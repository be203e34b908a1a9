//! Appends fields to a reusable buffer: the counterpart of the reader.

use multifd::ram::BlockName;

/// Appends big-endian fields to a buffer.
pub(crate) trait Put {
    fn put(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    /// A counted name.
    fn put_name(&mut self, name: &BlockName) {
        #[expect(clippy::cast_possible_truncation, reason = "a name has at most 255 bytes")]
        self.put_u8(name.as_bytes().len() as u8);
        self.put(name.as_bytes());
    }
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
