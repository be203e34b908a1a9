//! Allows one reader of a log at a time: a second reader would miss the bits that the first one takes.

use std::{
    collections::BTreeSet,
    io,
    sync::{Mutex, PoisonError},
};

/// The exclusive right to read the log at `place`, until dropped.
#[derive(Debug)]
pub(crate) struct SoleReader(usize);

/// Addresses, or other numbers that no two logs of this process use at the same time.
static TAKEN: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

impl SoleReader {
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if the log is being read already.
    pub(crate) fn of(place: usize) -> io::Result<Self> {
        let free = TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(place);
        if free { Ok(Self(place)) } else { Err(busy()) }
    }
}

impl Drop for SoleReader {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

fn busy() -> io::Error {
    let why = "another migration or capture is reading the dirty log: each of them would miss the bits that the other one \
               takes";
    io::Error::new(io::ErrorKind::ResourceBusy, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_reader_is_refused_until_the_first_has_gone() {
        let place = std::ptr::from_ref(&TAKEN).addr() + 1;
        let first = SoleReader::of(place).expect("free");
        assert_eq!(SoleReader::of(place).expect_err("taken").kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        SoleReader::of(place).expect("free again");
    }
}
