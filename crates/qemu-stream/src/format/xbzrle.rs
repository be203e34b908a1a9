//! The delta of an XBZRLE record: alternating counts of unchanged bytes and of new bytes.
//!
//! A count has one or two bytes, seven bits each, low part first; the high bit means that one more follows. Unchanged
//! bytes at the end of the page are not sent.

/// A delta that does not fit its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("delta does not fit the page: {what} at byte {at} of the delta")]
pub struct BadDelta {
    /// What is wrong.
    pub what: &'static str,
    /// The position in the delta.
    pub at: usize,
}

/// Applies a delta to the last contents of a page.
///
/// # Errors
/// If the delta is cut, has an empty run of new bytes, or exceeds the page. The page may then contain a part of it.
pub fn apply(delta: &[u8], page: &mut [u8]) -> Result<(), BadDelta> {
    let mut at = 0;
    let mut to = 0;
    while at < delta.len() {
        to += count(delta, &mut at)?;
        let length = count(delta, &mut at)?;
        if length == 0 {
            return Err(BadDelta { what: "empty run", at });
        }
        let from = delta.get(at..at + length).ok_or(BadDelta { what: "run is incomplete", at })?;
        let into = page.get_mut(to..to + length).ok_or(BadDelta { what: "run beyond the page", at })?;
        into.copy_from_slice(from);
        at += length;
        to += length;
    }
    Ok(())
}

/// Both numbers are below 2^14, and so are the callers' sums of them within a page and a `u16` of delta.
fn count(delta: &[u8], at: &mut usize) -> Result<usize, BadDelta> {
    let mut next = || {
        let byte = delta.get(*at).copied().ok_or(BadDelta { what: "count is incomplete", at: *at })?;
        *at += 1;
        Ok(usize::from(byte))
    };
    let low = next()?;
    if low & MORE == 0 {
        return Ok(low);
    }
    let high = next()?;
    if high & MORE != 0 {
        return Err(BadDelta { what: "count of three bytes", at: *at });
    }
    Ok((low & !MORE) | high << 7)
}

const MORE: usize = 0x80;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put_count(value: usize, out: &mut Vec<u8>) {
        let low = u8::try_from(value & 0x7f).unwrap();
        if value < 0x80 {
            out.push(low);
        } else {
            out.extend([low | 0x80, u8::try_from(value >> 7).unwrap()]);
        }
    }

    /// The inverse of `apply`, according to the format's description.
    fn delta(old: &[u8], new: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut at = 0;
        while let Some(skip) = (at..old.len()).position(|i| old[i] != new[i]) {
            let from = at + skip;
            let length = (from..old.len()).take_while(|i| old[*i] != new[*i]).count();
            put_count(skip, &mut out);
            put_count(length, &mut out);
            out.extend(&new[from..from + length]);
            at = from + length;
        }
        out
    }

    proptest! {
        #[test]
        fn a_delta_turns_the_old_page_into_the_new_one(
            old in proptest::collection::vec(0_u8..3, 4096), new in proptest::collection::vec(0_u8..3, 4096),
        ) {
            let mut page = old.clone();
            apply(&delta(&old, &new), &mut page).unwrap();
            prop_assert_eq!(page, new);
        }

        #[test]
        fn random_deltas_never_panic(delta in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let _ = apply(&delta, &mut [0; 4096]);
        }
    }

    #[test]
    fn a_run_that_ends_with_the_page_fits_and_one_byte_more_does_not() {
        let mut page = [0; 4096];
        assert_eq!(apply(&[0xff, 0x1f, 1, 7], &mut page), Ok(()));
        assert_eq!(page[4095], 7);
        let error = apply(&[0xff, 0x1f, 2, 7, 7], &mut page).unwrap_err();
        assert_eq!(error.what, "run beyond the page");
    }

    #[test]
    fn cut_and_empty_runs_are_refused() {
        let mut page = [0; 4096];
        assert_eq!(apply(&[0, 3, 1, 2], &mut page).unwrap_err().what, "run is incomplete");
        assert_eq!(apply(&[0], &mut page).unwrap_err().what, "count is incomplete");
        assert_eq!(apply(&[0, 0x81], &mut page).unwrap_err().what, "count is incomplete");
        assert_eq!(apply(&[0, 0], &mut page).unwrap_err().what, "empty run");
        assert_eq!(apply(&[0x80, 0x80, 1], &mut page).unwrap_err().what, "count of three bytes");
    }
}
