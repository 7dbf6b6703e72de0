//! What a failure means on a machine whose CPUs are emulated.
//!
//! QEMU's emulation of SVM now and then delivers an interrupt to a guest twice, the second time with interrupts off
//! (`docs/architecture.md`, "The lab"). That kills or hangs about one guest in some hundred, whatever runs in it. A case
//! that failed because its guest did is therefore run once more there, a few times in a run at most. What else such a
//! guest does before it dies is anyone's guess: one other failure of a run has a second chance, too. A fault of this stack
//! that shows more than once in a run is none of them. All of them are told at the end of the run.

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

/// Chances of a whole run on emulated CPUs: of failures with a sign, and of others.
const OF_SIGNS: u32 = 3;
const OF_OTHERS: u32 = 1;

/// The second chances that are left, and who took the others.
#[derive(Debug)]
pub struct SecondChances {
    of_signs: AtomicU32,
    of_others: AtomicU32,
    taken: Mutex<Vec<String>>,
}

impl SecondChances {
    /// Chances of a whole run: a few on emulated CPUs, none on real ones.
    #[must_use]
    pub fn new(emulated: bool) -> Self {
        let [of_signs, of_others] = [OF_SIGNS, OF_OTHERS].map(|count| AtomicU32::new(if emulated { count } else { 0 }));
        Self { of_signs, of_others, taken: Mutex::default() }
    }

    /// Whether the case `name`, which failed with this text, may run again; it takes one chance.
    pub fn take(&self, name: &str, failure: &str) -> bool {
        let has_sign = SIGNS.iter().any(|sign| failure.contains(sign));
        let chances = if has_sign { &self.of_signs } else { &self.of_others };
        let taken = chances.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
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
    fn guests_that_died_have_a_few_second_chances_and_anything_else_one() {
        let chances = SecondChances::new(true);
        assert!([DEAD; 4].map(|text| chances.take("dies", text)) == [true, true, true, false]);
        let failure = "containerd's log:\n  a line\n\nExit code 1, not 0\n";
        assert!([failure; 2].map(|text| chances.take("fails", text)) == [true, false]);
        assert_eq!(chances.taken()[2..], [format!("dies: {DEAD}"), "fails: Exit code 1, not 0".to_owned()]);
    }

    #[test]
    fn there_are_none_on_real_processors() {
        let chances = SecondChances::new(false);
        assert!(!chances.take("dies", DEAD) && !chances.take("fails", "Exit code 1, not 0"));
        assert_eq!(chances.taken(), [""; 0]);
    }
}
