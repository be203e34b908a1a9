//! Reads fields from a connection through its own buffer.
//!
//! The input is anything that can be read. The output is checked fields and slices that borrow from the buffer. The
//! reader knows its position in the stream, so that every refusal can name it. It distinguishes a clean end (between
//! two items) from a cut (within one).

use std::io::{self, Read};

use multifd::ram::BlockName;

use super::{SectionName, limits};
use crate::error::{Error, Malformed, Place, StreamKind};

/// A buffered, bounded reader of big-endian fields.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    stream: StreamKind,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The position of `buffer[start]` in the stream.
    position: u64,
    /// The position of the field that was read last.
    field: u64,
    /// How many bytes are read at once.
    ahead: usize,
    skip: Option<Skip<R>>,
}

/// Jumps over bytes of an input with random access. Returns how many there were.
pub(crate) type Skip<R> = fn(&mut R, u64) -> io::Result<u64>;

impl<R: Read> Reader<R> {
    /// The default size of the buffer: one call reads many small records, or a batch of pages.
    pub const CAPACITY: usize = 256 << 10;

    /// Creates a reader of `inner`, whose errors name `stream`.
    pub fn new(inner: R, stream: StreamKind) -> Self {
        Self::with_capacity(inner, stream, Self::CAPACITY)
    }

    /// Creates a reader with a buffer of `capacity` bytes, at least 512.
    pub fn with_capacity(inner: R, stream: StreamKind, capacity: usize) -> Self {
        let buffer = vec![0; capacity.max(512)].into_boxed_slice();
        Self { inner, stream, buffer, start: 0, end: 0, position: 0, field: 0, ahead: usize::MAX, skip: None }
    }

    /// Makes [`lend_or_skip`](Self::lend_or_skip) jump, and reads little ahead, because most of it would be jumped over.
    pub(crate) fn jumping(&mut self, skip: Skip<R>) {
        (self.skip, self.ahead) = (Some(skip), LITTLE);
    }

    /// Lends `count` bytes, or takes them and lends none if the input [jumps](Self::jumping). `what` names them if the stream is cut.
    ///
    /// # Errors
    /// As [`lend`](Self::lend).
    pub(crate) fn lend_or_skip(&mut self, count: usize, what: &'static str) -> Result<&[u8], Error> {
        let Some(skip) = self.skip else { return self.lend(count, what) };
        self.field = self.position;
        let buffered = count.min(self.end - self.start);
        self.consume(buffered);
        let rest = (count - buffered) as u64;
        if rest > 0 {
            let skipped = skip(&mut self.inner, rest).map_err(|error| self.io(error, what))?;
            self.position += skipped;
            if skipped < rest {
                return Err(self.cut(what));
            }
        }
        Ok(&[])
    }

    /// The number of bytes taken from the stream so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The place of the field that was read last: a refusal of the field names it.
    pub fn place(&self) -> Place {
        Place { stream: self.stream, offset: self.field }
    }

    /// The place of the next byte.
    pub fn here(&self) -> Place {
        Place { stream: self.stream, offset: self.position }
    }

    /// What the reader reads from.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The underlying reader, to set a deadline or shut it down. Reading from it loses bytes.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The underlying reader; buffered bytes are lost.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// Whether all bytes that were read were taken, so that the next field waits for the connection.
    pub fn is_drained(&self) -> bool {
        self.start == self.end
    }

    /// The next byte without taking it; `None` at the end of the stream.
    ///
    /// # Errors
    /// If the system cannot read.
    pub fn peek(&mut self) -> Result<Option<u8>, Error> {
        if self.is_drained() {
            self.fill()?;
        }
        self.field = self.position;
        Ok(self.held().first().copied())
    }

    /// The bytes that have arrived and were not taken; at least one unless the stream has ended.
    ///
    /// # Errors
    /// If the system cannot read.
    pub fn arrived(&mut self) -> Result<&[u8], Error> {
        self.peek()?;
        Ok(self.held())
    }

    /// The next `count` bytes without taking them; `None` if the stream ends before, or the buffer is smaller.
    ///
    /// # Errors
    /// If the system cannot read.
    pub fn peek_bytes(&mut self, count: usize) -> Result<Option<&[u8]>, Error> {
        if count > self.buffer.len() {
            return Ok(None);
        }
        while self.end - self.start < count {
            if self.fill()? == 0 {
                return Ok(None);
            }
        }
        Ok(self.held().get(..count))
    }

    /// Takes `count` of the bytes that [`Reader::arrived`] has returned; no more than those.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.end - self.start);
        self.start += count;
        self.position += count as u64;
    }

    /// Takes `count` bytes and lends them without a copy. `what` names them if the stream is cut.
    ///
    /// # Errors
    /// If the stream ends before, or `count` exceeds the size of the buffer.
    pub fn lend(&mut self, count: usize, what: &'static str) -> Result<&[u8], Error> {
        self.field = self.position;
        if count > self.buffer.len() {
            return Err(Malformed::too_long(what, self.buffer.len() as u64, count as u64).at(self.place()));
        }
        while self.end - self.start < count {
            if self.fill()? == 0 {
                return Err(self.cut(what));
            }
        }
        let from = self.start;
        self.consume(count);
        Ok(self.buffer.get(from..from + count).unwrap_or_default())
    }

    /// Fills `into`. Bytes that are not in the buffer yet go from the connection directly into it.
    ///
    /// # Errors
    /// If the stream ends before.
    pub fn exact(&mut self, into: &mut [u8], what: &'static str) -> Result<(), Error> {
        self.field = self.position;
        let buffered = into.len().min(self.end - self.start);
        let (head, mut rest) = into.split_at_mut(buffered);
        head.copy_from_slice(self.held().get(..buffered).unwrap_or_default());
        self.consume(buffered);
        while !rest.is_empty() {
            let count = retry(|| self.inner.read(rest)).map_err(|e| self.io(e, what))?;
            if count == 0 {
                return Err(self.cut(what));
            }
            self.position += count as u64;
            rest = rest.get_mut(count..).expect("a read fills no more than it is given");
        }
        Ok(())
    }

    /// Takes `length` bytes, at most `max`. Memory grows with what arrives, not with what is announced.
    ///
    /// # Errors
    /// If `length` exceeds `max` or the stream ends before.
    pub fn bytes(&mut self, length: u64, max: u64, what: &'static str) -> Result<Vec<u8>, Error> {
        self.field = self.position;
        let length = match usize::try_from(length) {
            Ok(length_fits) if length <= max => length_fits,
            _ => return Err(Malformed::too_long(what, max, length).at(self.place())),
        };
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let from = bytes.len();
            bytes.resize(from + (length - from).min(limits::AHEAD.max(from)), 0);
            self.exact(bytes.get_mut(from..).unwrap_or_default(), what)?;
        }
        Ok(bytes)
    }

    /// Takes a `u8`.
    ///
    /// # Errors
    /// If the stream ends before.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, Error> {
        self.array(what).map(u8::from_be_bytes)
    }

    /// Takes a `u16`.
    ///
    /// # Errors
    /// If the stream ends before.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, Error> {
        self.array(what).map(u16::from_be_bytes)
    }

    /// Takes a `u32`.
    ///
    /// # Errors
    /// If the stream ends before.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        self.array(what).map(u32::from_be_bytes)
    }

    /// Takes a `u64`.
    ///
    /// # Errors
    /// If the stream ends before.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, Error> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// Takes an array.
    ///
    /// # Errors
    /// If the stream ends before.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.lend(N, what)?);
        Ok(array)
    }

    /// Takes a counted name of a block.
    ///
    /// # Errors
    /// If it is empty, contains a NUL, or the stream ends before.
    pub fn block_name(&mut self, what: &'static str) -> Result<BlockName, Error> {
        let at = self.here();
        let length = usize::from(self.u8(what)?);
        let bytes = self.lend(length, what)?;
        BlockName::new(bytes)
            .ok_or_else(|| Malformed::Name { field: what, found: bytes.escape_ascii().to_string() }.at(at))
    }

    /// Takes a counted name of a section.
    ///
    /// # Errors
    /// If it is empty, contains a NUL, or the stream ends before.
    pub fn section_name(&mut self, what: &'static str) -> Result<SectionName, Error> {
        self.block_name(what).map(SectionName::from)
    }

    /// The error of a stream that ends where `expected` should be.
    pub fn cut(&self, expected: &'static str) -> Error {
        let offset = self.position + (self.end - self.start) as u64;
        Error::Cut { at: Place { stream: self.stream, offset }, expected }
    }

    /// Continues at another position of an input with random access, with an empty buffer.
    pub(crate) fn jump(&mut self, inner: R, position: u64) {
        self.inner = inner;
        (self.start, self.end) = (0, 0);
        (self.position, self.field) = (position, position);
    }

    /// The bytes that have arrived and were not taken.
    fn held(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Reads once and appends to the buffer; 0 at the end of the stream.
    fn fill(&mut self) -> Result<usize, Error> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let limit = self.end.saturating_add(self.ahead).min(self.buffer.len());
        let free = self.buffer.get_mut(self.end..limit).unwrap_or_default();
        let count = retry(|| self.inner.read(free)).map_err(|e| self.io(e, "more"))?;
        self.end += count;
        Ok(count)
    }

    fn io(&self, source: io::Error, expected: &'static str) -> Error {
        let at = self.here();
        match source.kind() {
            io::ErrorKind::WouldBlock => Error::TimedOut { at, expected },
            // A timeout of the system itself means that the host is lost, and its text says so.
            io::ErrorKind::TimedOut if source.get_ref().is_none() && source.raw_os_error().is_none() => {
                Error::TimedOut { at, expected }
            }
            _ => Error::Io { at, doing: "read", source },
        }
    }
}

/// Bytes that are read ahead of an input that jumps: the heads of some pages that are zero, or one of a page that is jumped over.
const LITTLE: usize = 128;

fn retry(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns one byte per call, as a slow connection does.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let count = into.len().min(1);
            self.0.read(&mut into[..count])
        }
    }

    #[test]
    fn fields_are_put_together_from_single_bytes() {
        let bytes = [1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 2, b'h', b'i'];
        let mut r = Reader::new(Trickle(&bytes), StreamKind::Main);
        assert_eq!(r.u8("a").unwrap(), 1);
        assert_eq!(r.u16("b").unwrap(), 2);
        assert_eq!(r.u32("c").unwrap(), 3);
        assert_eq!(r.u64("d").unwrap(), 4);
        assert_eq!(r.section_name("e").unwrap().to_string(), "hi");
        assert_eq!(r.position(), 18);
        assert_eq!(r.peek().unwrap(), None);
    }

    #[test]
    fn a_field_cut_in_the_middle_names_the_field_and_the_end() {
        let mut r = Reader::new(&[0_u8, 1, 2, 3, 4][..], StreamKind::Main);
        r.u16("head").unwrap();
        let error = r.u32("total").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the source closed the connection (cancelled, or its process ended); main stream: offset 0x5: stream ends where total was expected"
        );
    }

    #[test]
    fn a_slice_longer_than_the_buffer_is_refused() {
        let bytes = [0; 1024];
        let mut r = Reader::with_capacity(&bytes[..], StreamKind::Main, 512);
        assert!(r.lend(512, "page").is_ok());
        assert!(matches!(r.lend(513, "page"), Err(Error::Malformed { .. })));
    }

    #[test]
    fn bytes_above_their_bound_are_refused_before_they_are_read() {
        let mut r = Reader::new(&[0_u8; 9][..], StreamKind::Main);
        assert!(matches!(r.bytes(9, 8, "blob"), Err(Error::Malformed { .. })));
        assert_eq!(r.position(), 0);
        assert_eq!(r.bytes(8, 8, "blob").unwrap(), [0; 8]);
    }

    #[test]
    fn an_announced_length_allocates_only_what_arrives() {
        let mut r = Reader::new(&[7_u8; 3][..], StreamKind::Main);
        assert!(matches!(r.bytes(1 << 40, 1 << 41, "blob"), Err(Error::Cut { .. })));
    }

    #[test]
    fn a_slice_taken_directly_uses_what_was_buffered_first() {
        let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
        let mut r = Reader::with_capacity(&bytes[..], StreamKind::Main, 512);
        r.u8("first").unwrap();
        let mut page = vec![0; 4000];
        r.exact(&mut page, "page").unwrap();
        assert_eq!(page, bytes[1..4001]);
        assert_eq!(r.u8("next").unwrap(), bytes[4001]);
    }

    #[test]
    fn an_empty_name_and_one_with_a_nul_are_refused() {
        for bytes in [&[0_u8][..], &[2, b'a', 0][..]] {
            let mut r = Reader::new(bytes, StreamKind::Main);
            assert!(matches!(
                r.block_name("idstr"),
                Err(Error::Malformed { what: Malformed::Name { .. }, .. })
            ));
        }
    }
}
