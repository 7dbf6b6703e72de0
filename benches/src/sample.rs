//! Repeated measurements of one quantity.

/// The values of one quantity, measured again and again; never empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    sorted: Vec<f64>,
    /// In the order measured, to pair them with another's.
    values: Vec<f64>,
}

impl Sample {
    /// A sample of these values; none when there are none, or one is no number.
    #[must_use]
    pub fn new(values: Vec<f64>) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Self { sorted, values })
    }

    /// How many values.
    #[must_use]
    pub fn count(&self) -> usize {
        self.values.len()
    }

    /// The middle value, or the mean of the two in the middle.
    #[must_use]
    pub fn median(&self) -> f64 {
        let middle = self.sorted.len() / 2;
        if self.sorted.len() % 2 == 1 {
            self.sorted[middle]
        } else {
            f64::midpoint(self.sorted[middle - 1], self.sorted[middle])
        }
    }

    /// The smallest value.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.sorted[0]
    }

    /// The largest value.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.sorted[self.sorted.len() - 1]
    }

    /// The smallest value that this many of a hundred values do not exceed: one that was measured.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.sorted.len() * percent).div_ceil(100);
        self.sorted[rank.clamp(1, self.sorted.len()) - 1]
    }

    /// The median of the ratios of values that were measured one after the other, which cancels what
    /// both suffered from alike; the ratio of the medians where the two were not measured in pairs.
    #[must_use]
    pub fn ratio(&self, peer: &Self) -> f64 {
        if self.count() != peer.count() {
            return self.median() / peer.median();
        }
        let ratios = self.values.iter().zip(&peer.values).map(|(own, peer)| own / peer).collect();
        Self::new(ratios).map_or(f64::NAN, |ratios| ratios.median())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn sample(values: &[f64]) -> Sample {
        Sample::new(values.to_vec()).unwrap()
    }

    #[rstest]
    #[case(&[3.0, 1.0, 2.0], 2.0)]
    #[case(&[4.0, 1.0, 2.0, 3.0], 2.5)]
    #[case(&[7.0], 7.0)]
    fn the_median_is_the_middle(#[case] values: &[f64], #[case] median: f64) {
        assert!((sample(values).median() - median).abs() < 1e-12);
    }

    #[test]
    fn the_ratio_compares_neighbours_in_time() {
        // The machine became twice as slow after the first pair: the ratio does not notice.
        assert!((sample(&[1.0, 2.0, 2.0]).ratio(&sample(&[2.0, 4.0, 4.0])) - 0.5).abs() < 1e-12);
        assert!((sample(&[1.0, 3.0]).ratio(&sample(&[4.0])) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let sample = Sample::new((1..=60).map(f64::from).collect()).unwrap();
        assert_eq!([0, 50, 99, 100].map(|percent| sample.percentile(percent)), [1.0, 30.0, 60.0, 60.0]);
    }

    #[test]
    fn nothing_and_no_number_make_no_sample() {
        assert_eq!(Sample::new(vec![]), None);
        assert_eq!(Sample::new(vec![1.0, f64::NAN]), None);
    }
}
