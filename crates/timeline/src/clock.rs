//! The host's clock, and the guest's clock in terms of it.

use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC in nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    // CLOCK_MONOTONIC exists on every Linux; 0 would only spoil one stamp.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|time| u64::try_from(std::time::Duration::from(time).as_nanos()).ok())
        .unwrap_or(0)
}

/// The difference between the guest's clock and the host's, from one exchange of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockOffset {
    /// Guest clock minus host clock, nanoseconds.
    guest_minus_host: i128,
}

impl ClockOffset {
    /// Estimates the offset as NTP does (RFC 5905, section 8): the exchange is assumed to take as long there as back.
    /// `sent` and `received` are the host's clock, `arrived` and `answered` the guest's, all in nanoseconds.
    #[must_use]
    pub fn from_exchange(sent: u64, arrived: i64, answered: i64, received: u64) -> Self {
        let there = i128::from(arrived) - i128::from(sent);
        let back = i128::from(answered) - i128::from(received);
        Self { guest_minus_host: (there + back) / 2 }
    }

    /// A guest stamp on the host's clock; `None` when a guest claims a time before the host's boot or far beyond.
    #[must_use]
    pub fn to_host(self, guest_ns: i64) -> Option<u64> {
        u64::try_from(i128::from(guest_ns) - self.guest_minus_host).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_stamps_land_between_the_hosts_own() {
        // The guest started at 100 of the host's clock; both ways take 5, the guest works for 10.
        let offset = ClockOffset::from_exchange(200, 105, 115, 220);
        assert_eq!(offset.to_host(0), Some(100));
        assert_eq!(offset.to_host(105), Some(205));
    }

    #[test]
    fn a_lying_guest_gets_no_stamp_outside_the_clock() {
        let offset = ClockOffset::from_exchange(200, i64::MAX, i64::MAX, 220);
        assert_eq!(offset.to_host(0), None);
        assert_eq!(ClockOffset::from_exchange(0, i64::MIN, i64::MIN, 0).to_host(i64::MAX), Some(u64::MAX));
    }

    #[test]
    fn the_clock_does_not_go_back() {
        let first = now_ns();
        assert!(first > 0 && now_ns() >= first);
    }
}
