//! How one content of a file is told from the next.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::stat64;

/// Times of files are those of the kernel's tick, which is a hundredth of a second at most: two changes within one may
/// have one time.
const TICK: Duration = Duration::from_millis(20);

/// A file's size and times: each change of its content by write(2) or truncate(2) changes one of them. A program that
/// has it mapped can change it without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    pub(super) fn of(attributes: &stat64) -> Self {
        Self {
            size: attributes.st_size,
            modified: (attributes.st_mtime, attributes.st_mtime_nsec),
            changed: (attributes.st_ctime, attributes.st_ctime_nsec),
        }
    }

    /// Whether a change from `now` on is certain to make another version: this one is older than a tick.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        let since_epoch = |(seconds, nanoseconds): (i64, i64)| {
            let seconds = Duration::from_secs(u64::try_from(seconds).ok()?);
            Some(seconds + Duration::from_nanos(u64::try_from(nanoseconds).ok()?))
        };
        let last = self.modified.max(self.changed);
        let last = since_epoch(last).and_then(|since| UNIX_EPOCH.checked_add(since));
        last.and_then(|last| now.duration_since(last).ok()).is_some_and(|age| age > TICK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_of_this_moment_or_of_the_future_is_not_settled() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        let version = |modified, changed| Version { size: 1, modified, changed };
        assert!(version((999, 0), (999, 900_000_000)).is_settled(now));
        assert!(!version((999, 0), (999, 990_000_000)).is_settled(now));
        assert!(!version((999, 990_000_000), (999, 0)).is_settled(now));
        assert!(!version((1001, 0), (999, 0)).is_settled(now));
        assert!(!version((-1, 0), (-1, 0)).is_settled(now));
    }
}
