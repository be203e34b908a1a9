//! One reader of a log at a time: bits that one takes, the other would miss.

use std::{
    collections::BTreeSet,
    io,
    sync::{Mutex, PoisonError},
};

/// The right to read what `place` keeps, until dropped.
#[derive(Debug)]
pub(super) struct Turn(usize);

/// Addresses, or other numbers that no two logs of this process share at one time.
static TAKEN: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

impl Turn {
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] if it is being read already.
    pub(super) fn take(place: usize) -> io::Result<Self> {
        let free = TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(place);
        if free { Ok(Self(place)) } else { Err(busy()) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

fn busy() -> io::Error {
    let why = "the dirty log is being read already, by another migration or capture: each would miss what the other takes";
    io::Error::new(io::ErrorKind::ResourceBusy, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_reader_is_refused_until_the_first_has_gone() {
        let place = std::ptr::from_ref(&TAKEN).addr() + 1;
        let first = Turn::take(place).expect("free");
        assert_eq!(Turn::take(place).expect_err("taken").kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        Turn::take(place).expect("free again");
    }
}
