//! Computes medians, with their spread, from the samples of a peer.

use crate::{
    cases::{Case, Who},
    peer::Sample,
};

/// A case with its results.
pub(crate) struct Measured {
    pub(crate) case: Case,
    /// The results in the order of the case's peers; or why a peer was not measured.
    pub(crate) peers: Vec<(Who, Result<Samples, String>)>,
}

/// All rounds of one peer in one case.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(pub(crate) Vec<Sample>);

/// The middle, and the ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Samples {
    fn spread(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        let mut values: Vec<f64> = self.0.iter().map(of).collect::<Option<_>>()?;
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Spread { median, least, most })
    }

    /// Bytes of RAM per second.
    pub(crate) fn speed(&self) -> Option<Spread> {
        self.spread(|sample| Some(sample.bytes as f64 / sample.seconds))
    }

    /// CPU seconds per GiB of RAM: of the source, of the destination, of both together.
    pub(crate) fn cpu(&self) -> Option<[Spread; 3]> {
        let of = |pick: fn([f64; 2]) -> f64| {
            self.spread(move |sample| Some(pick(sample.cpu?) / (sample.bytes as f64 / GIB)))
        };
        Some([of(|[source, _]| source)?, of(|[_, destination]| destination)?, of(|[a, b]| a + b)?])
    }

    /// Bytes on the wire per byte of RAM.
    pub(crate) fn wire(&self) -> Option<f64> {
        self.spread(|sample| Some(sample.wire? as f64 / sample.bytes as f64)).map(|spread| spread.median)
    }

    /// The greatest memory beyond RAM, in bytes: of the source, of the destination.
    pub(crate) fn beyond(&self) -> Option<[u64; 2]> {
        let side = |of: fn([u64; 2]) -> u64| self.0.iter().filter_map(|sample| sample.beyond.map(of)).max();
        Some([side(|[source, _]| source)?, side(|[_, destination]| destination)?])
    }

    /// The milliseconds for which the guest was stopped.
    pub(crate) fn downtime(&self) -> Option<Spread> {
        self.spread(|sample| sample.downtime.map(|ms| ms as f64))
    }
}

const GIB: f64 = (1 << 30) as f64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_and_one_slow_round_does_not_move_it() {
        let round =
            |seconds| Sample { seconds, bytes: 1 << 30, cpu: Some([seconds, 1.0]), ..Sample::default() };
        let samples = Samples([0.5, 0.25, 100.0].map(round).to_vec());
        let speed = samples.speed().expect("samples");
        assert_eq!((speed.median, speed.most), (GIB * 2.0, GIB * 4.0));
        assert_eq!(samples.cpu().expect("told")[2].median, 1.5);
        assert_eq!(Samples([1.0, 2.0].map(round).to_vec()).cpu().expect("told")[0].median, 1.5);
        assert!(
            samples.wire().is_none() && samples.downtime().is_none() && Samples::default().speed().is_none()
        );
    }
}
