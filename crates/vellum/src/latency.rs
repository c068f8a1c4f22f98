//! [`Latencies`]: how long requests took, counted in buckets that are at most 1/16 wide.

use std::time::Duration;

/// Buckets for each power of two.
const PARTS: u64 = 16;

/// Counts of request times.
#[derive(Clone, Debug)]
pub struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { buckets: vec![0; bucket(u64::MAX) + 1], count: 0, sum_ns: 0, max_ns: 0 }
    }
}

impl Latencies {
    /// Counts one request.
    pub fn add(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.buckets.get_mut(bucket(ns)) {
            *count += 1;
        }
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds what another thread counted.
    pub fn merge(&mut self, other: &Latencies) {
        for (count, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *count += more;
        }
        self.count += other.count;
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Requests that were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The mean.
    pub fn mean(&self) -> Duration {
        let mean = self.sum_ns.checked_div(u128::from(self.count)).unwrap_or(0);
        Duration::from_nanos(u64::try_from(mean).unwrap_or(u64::MAX))
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns)
    }

    /// The time within which `percent` of the requests were done (the upper end of its bucket).
    pub fn percentile(&self, percent: f64) -> Duration {
        let wanted = ((self.count as f64) * percent / 100.0).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(bucket_end(index).min(self.max_ns));
            }
        }
        self.max()
    }
}

/// 0 to 15 have buckets of their own; above, each power of two has [`PARTS`].
fn bucket(ns: u64) -> usize {
    if ns < PARTS {
        return ns as usize;
    }
    let power = u64::from(ns.ilog2());
    let part = (ns >> (power - 4)) & (PARTS - 1);
    ((power - 3) * PARTS + part) as usize
}

/// The last value of a bucket.
fn bucket_end(index: usize) -> u64 {
    let index = index as u64;
    if index < PARTS {
        return index;
    }
    let (power, part) = (index / PARTS + 3, index % PARTS);
    let end = u128::from(PARTS + part + 1) << (power - 4);
    u64::try_from(end - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_lies_in_its_bucket_and_buckets_are_narrow() {
        let powers = (0..64).map(|shift| 1u64 << shift);
        for ns in powers.flat_map(|n| [n - 1, n, n + n / 3]).chain([0, 15, 16, 17, u64::MAX]) {
            let end = bucket_end(bucket(ns));
            assert!(end >= ns && end - ns <= ns / 16, "{ns} {end}");
            assert!(bucket(ns) == 0 || bucket_end(bucket(ns) - 1) < ns, "{ns}");
        }
    }

    #[test]
    fn percentiles() {
        let mut all = Latencies::default();
        (1..=1000).for_each(|us| all.add(Duration::from_micros(us)));
        let near = |found: Duration, us: u64| {
            let found = found.as_nanos() as u64;
            assert!(found >= us * 1000 && found <= us * 1000 * 17 / 16, "{found} {us}");
        };
        near(all.percentile(50.0), 500);
        near(all.percentile(99.0), 990);
        assert_eq!(all.percentile(100.0), Duration::from_micros(1000));
        assert_eq!(all.mean(), Duration::from_nanos(500_500));
        let mut twice = all.clone();
        twice.merge(&all);
        assert_eq!((twice.count(), twice.mean()), (2000, all.mean()));
        assert_eq!(Latencies::default().percentile(99.0), Duration::ZERO);
    }
}
