//! A histogram of times, which threads add to without a lock.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How long something took, many times. Each time is known to within 6.25 %; from about a minute on, all count as a minute.
#[derive(Debug)]
pub struct Latencies {
    /// Only counts, as is the sum: no other access depends on them.
    buckets: Box<[AtomicU64]>,
    nanos: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), nanos: AtomicU64::new(0) }
    }
}

impl Latencies {
    /// Adds a time.
    pub fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket(micros)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// The sum of the times.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    /// How many times were added.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// The time that `per_mille` of a thousand do not exceed: 500 for the median, 990 for the 99th percentile. `None` if
    /// nothing was added.
    pub fn percentile(&self, per_mille: u16) -> Option<Duration> {
        let count = self.count();
        let rank = (u128::from(count) * u128::from(per_mille.min(1000))).div_ceil(1000).max(1);
        let mut seen = 0;
        (0..).zip(&self.buckets).find_map(|(index, bucket)| {
            seen += u128::from(bucket.load(Ordering::Relaxed));
            (seen >= rank).then(|| Duration::from_micros(most(index)))
        })
    }
}

/// The bucket of a time: one for each of the first microseconds, then 16 for each power of two.
fn bucket(micros: u64) -> usize {
    let micros = micros.min(MOST);
    if micros < PER_POWER {
        return usize::try_from(micros).unwrap_or(0);
    }
    let power = micros.ilog2() - PER_POWER.ilog2();
    let index = u64::from(power) * PER_POWER + (micros >> power);
    usize::try_from(index).unwrap_or(BUCKETS - 1)
}

/// The longest time of a bucket, in microseconds.
fn most(bucket: u64) -> u64 {
    if bucket < PER_POWER {
        return bucket;
    }
    let power = bucket / PER_POWER - 1;
    ((bucket - power * PER_POWER + 1) << power) - 1
}

const PER_POWER: u64 = 16;
/// 2^26 microseconds, about a minute.
const MOST: u64 = (1 << 26) - 1;
/// One more than the bucket of [`MOST`].
const BUCKETS: usize = 22 * 16 + 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_a_bucket_that_is_at_most_a_sixteenth_wide() {
        let mut last = 0;
        for micros in (0..5000).chain((0..26).map(|power| 1 << power)).chain([MOST, MOST + 1, u64::MAX]) {
            let found = bucket(micros);
            assert!(found < BUCKETS, "{micros}");
            let longest = most(found as u64);
            let shown = micros.min(MOST);
            assert!(longest >= shown && longest <= shown + shown / 16, "{micros}: {longest}");
        }
        for found in (0..5000).map(bucket) {
            assert!(found == last || found == last + 1, "{last} then {found}");
            last = found;
        }
    }

    #[test]
    fn percentiles_are_those_of_what_was_added() {
        let times = Latencies::default();
        assert_eq!(times.percentile(500), None);
        (1..=1000).for_each(|micros| times.add(Duration::from_micros(micros)));
        assert_eq!((times.count(), times.total()), (1000, Duration::from_micros(500_500)));
        for (per_mille, exact) in [(0, 1), (500, 500), (990, 990), (1000, 1000), (u16::MAX, 1000)] {
            let found = times.percentile(per_mille).expect("some").as_micros();
            assert!((exact..=exact + exact / 16).contains(&found), "{per_mille}: {found}");
        }
    }
}
