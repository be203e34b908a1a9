//! Tracks which zero-copy sends the system has completed.
//!
//! The system numbers the sends from 0 on, in 32 bits that wrap, and reports completions in ranges, in any order.

use std::{io, ops::Range};

/// The progress of zero-copy sends.
#[derive(Debug, Default)]
pub(super) struct Completions {
    sent: u64,
    /// All sends before this number are complete.
    done: u64,
    /// Ranges that were reported before an earlier send was complete, by number; none touches another or `done`.
    early: Vec<Range<u64>>,
    copied: u64,
}

impl Completions {
    /// One more has been sent.
    pub(super) fn sent(&mut self) {
        self.sent += 1;
    }

    /// The number of completed sends up to the first that is pending.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// The number of sends that the system has copied although it was asked not to.
    pub(super) fn copied(&self) -> u64 {
        self.copied
    }

    /// Records that the system has completed the sends `first` to `last`.
    ///
    /// # Errors
    /// If these were never sent, or were reported before.
    pub(super) fn complete(&mut self, first: u32, last: u32, copied: bool) -> io::Result<()> {
        // Fewer than 2^32 are pending, so the lower 32 bits identify each of them.
        #[expect(clippy::cast_possible_truncation, reason = "the last 32 bits are meant")]
        let low = self.done as u32;
        let number = |low_bits: u32| self.done + u64::from(low_bits.wrapping_sub(low));
        let range = number(first)..number(last) + 1;
        let known = self.early.iter().any(|early| range.start < early.end && early.start < range.end);
        if range.is_empty() || range.end > self.sent || known {
            let text = format!(
                "the system reports completion of sends {first} to {last} of {} to {}",
                self.done, self.sent
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if copied {
            self.copied += range.end - range.start;
        }
        if range.start > self.done {
            self.early.push(range);
            return Ok(());
        }
        self.done = range.end;
        while let Some(next) = self.early.iter().position(|early| early.start == self.done) {
            self.done = self.early.swap_remove(next).end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(sent: u64, done: u64) -> Completions {
        Completions { sent, done, ..Completions::default() }
    }

    #[test]
    fn ranges_in_any_order_add_up() {
        let mut some = after(10, 0);
        some.complete(3, 4, false).expect("sent");
        some.complete(7, 9, true).expect("sent");
        assert_eq!((some.done(), some.copied()), (0, 3));
        some.complete(0, 2, true).expect("sent");
        assert_eq!((some.done(), some.copied()), (5, 6));
        some.complete(5, 6, false).expect("sent");
        assert_eq!((some.done(), some.copied(), some.early.len()), (10, 6, 0));
    }

    #[test]
    fn numbers_go_on_where_32_bits_wrap() {
        let mut some = after((1 << 32) + 2, (1 << 32) - 2);
        some.complete(0, 1, false).expect("sent");
        assert_eq!(some.done(), (1 << 32) - 2);
        some.complete(u32::MAX - 1, u32::MAX, false).expect("sent");
        assert_eq!(some.done(), (1 << 32) + 2);
        let mut across = after((5 << 32) + 3, (5 << 32) - 3);
        across.complete(u32::MAX - 2, 2, true).expect("sent");
        assert_eq!((across.done(), across.copied()), ((5 << 32) + 3, 6));
    }

    #[test]
    fn what_was_never_sent_or_told_of_before_is_refused() {
        for (first, last) in [(4, 10), (10, 10), (3, 3), (2, 5), (6, 4), (0, u32::MAX)] {
            let mut some = after(10, 4);
            let error = some.complete(first, last, false).expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{first} to {last}: {error}");
            assert_eq!((some.done(), some.copied()), (4, 0));
        }
        let mut some = after(10, 0);
        some.complete(4, 6, false).expect("sent");
        for (first, last) in [(4, 6), (6, 7), (2, 4), (5, 5), (0, 9)] {
            some.complete(first, last, false).expect_err("reported before");
        }
    }
}
