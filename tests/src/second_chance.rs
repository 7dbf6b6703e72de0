//! What a failure means on a machine whose CPUs are emulated.
//!
//! QEMU's emulation of SVM now and then delivers an interrupt to a guest twice, the second time with interrupts off
//! (`docs/architecture.md`, "The lab"). That kills or hangs about one guest in some hundred, whatever runs in it. A case
//! that failed because its guest did is therefore run once more there, a few times in a run at most, and it is said.

use std::sync::atomic::{AtomicU32, Ordering};

/// What the text of a failure says when a guest died or hung. Any other failure counts at once.
const SIGNS: [&str; 9] = [
    "the guest met a triple fault",
    "the guest kernel panicked",
    "did not answer within",
    "did not end before its deadline",
    "DEADLINE_EXCEEDED",
    // What is said of a guest that does not follow a change: dragonball's errors, and the runtime's.
    "Unseen(",
    "InUse(",
    "did not look at the new device within",
    "the guest reached",
];

/// The second chances that are left.
#[derive(Debug)]
pub struct SecondChances(AtomicU32);

impl SecondChances {
    /// Chances of a whole run: three on emulated CPUs, none on real ones.
    #[must_use]
    pub fn new(emulated: bool) -> Self {
        Self(AtomicU32::new(if emulated { 3 } else { 0 }))
    }

    /// Whether a case that failed with this text may run again; it takes one chance.
    pub fn take(&self, failure: &str) -> bool {
        SIGNS.iter().any(|sign| failure.contains(sign))
            && self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: &str = "ctr: failed to create shim task: the guest met a triple fault before its agent answered";

    #[test]
    fn only_a_guest_that_died_has_a_second_chance_and_only_on_emulated_cpus() {
        let chances = SecondChances::new(true);
        assert!(!chances.take("Exit code 1, not 0"));
        assert!([DEAD; 4].map(|text| chances.take(text)) == [true, true, true, false]);
        assert!(!SecondChances::new(false).take(DEAD));
    }
}
