//! What a failure means on a machine whose CPUs are emulated.
//!
//! QEMU's emulation of SVM has faults that kill or hang guests, whatever runs in them; those that are known are mended
//! (`docs/architecture.md`, "The lab"). A case that failed because its guest did is therefore run once more there, a few times
//! in a run at most, and it is said: at once, and at the end of the run.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

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

/// The second chances that are left, and who took the others.
#[derive(Debug)]
pub struct SecondChances {
    left: AtomicU32,
    taken: Mutex<Vec<String>>,
}

impl SecondChances {
    /// Chances of a whole run: three on emulated CPUs, none on real ones.
    #[must_use]
    pub fn new(emulated: bool) -> Self {
        Self { left: AtomicU32::new(if emulated { 3 } else { 0 }), taken: Mutex::default() }
    }

    /// Whether the case `name`, which failed with this text, may run again; it takes one chance.
    pub fn take(&self, name: &str, failure: &str) -> bool {
        let taken = SIGNS.iter().any(|sign| failure.contains(sign))
            && self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        if taken {
            // The reason comes last.
            let reason = failure.trim_end().lines().last().unwrap_or_default();
            self.taken.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{name}: {reason}"));
        }
        taken
    }

    /// What ran again and why, to be told at the end.
    pub fn taken(&self) -> Vec<String> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: &str = "ctr: failed to create shim task: the guest met a triple fault before its agent answered";

    #[test]
    fn only_a_guest_that_died_has_a_second_chance_and_only_on_emulated_cpus() {
        let chances = SecondChances::new(true);
        assert!(!chances.take("fails", "Exit code 1, not 0"));
        assert!([DEAD; 4].map(|text| chances.take("dies", text)) == [true, true, true, false]);
        assert!(!SecondChances::new(false).take("dies", DEAD));
    }

    #[test]
    fn those_that_were_taken_are_told_with_their_reason_which_comes_last() {
        let chances = SecondChances::new(true);
        assert!(!chances.take("fails", "Exit code 1, not 0"));
        assert!(chances.take("dies", &format!("containerd's log:\n  a line\n\n{DEAD}\n")));
        assert_eq!(chances.taken(), [format!("dies: {DEAD}")]);
    }
}
