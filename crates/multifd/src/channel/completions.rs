//! Which of the sendings that were made in place the system is through with.
//!
//! It numbers them from 0 on, in 32 bits that wrap, and tells of them in ranges, which may come in any order.

use std::{io, ops::Range};

/// How far sending in place has come.
#[derive(Debug, Default)]
pub(super) struct Completions {
    sent: u64,
    /// All before this one are through.
    done: u64,
    /// Those told of too early, by number; none touches another one or `done`.
    early: Vec<Range<u64>>,
    copied: u64,
}

impl Completions {
    /// One more has been sent.
    pub(super) fn sent(&mut self) {
        self.sent += 1;
    }

    /// How many are through, up to the first that is not.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// How many the system has copied, though it was asked not to.
    pub(super) fn copied(&self) -> u64 {
        self.copied
    }

    /// The system is through with `first` to `last`.
    ///
    /// # Errors
    /// If these were never sent, or told of before.
    pub(super) fn complete(&mut self, first: u32, last: u32, copied: bool) -> io::Result<()> {
        // Fewer than 2^32 are under way, so the last 32 bits tell each from all others.
        #[expect(clippy::cast_possible_truncation, reason = "the last 32 bits are meant")]
        let low = self.done as u32;
        let number = |told: u32| self.done + u64::from(told.wrapping_sub(low));
        let range = number(first)..number(last) + 1;
        let known = self.early.iter().any(|early| range.start < early.end && early.start < range.end);
        if range.is_empty() || range.end > self.sent || known {
            let text = format!(
                "the system is through with sendings {first} to {last} of {} to {}, it says",
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
            some.complete(first, last, false).expect_err("told of before");
        }
    }
}
