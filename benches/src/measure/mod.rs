//! What runs where KVM is (this host or the lab machine): starts VMs and containers, and answers with raw samples.

pub mod block;
pub mod boot;
pub mod containers;
pub mod hot_plug;
pub mod idle;
mod lines;
pub mod machine;
pub mod memory;
pub mod net;
pub mod pods;
mod qmp;
pub mod smaps;
pub mod trace;
pub mod vmm;

use std::collections::BTreeMap;

use anyhow::Result;

/// Samples by name: one vector of values per quantity, all of one length, so that values of one index are of one round.
pub type Samples = BTreeMap<String, Vec<f64>>;

/// How often a guest may be started until it boots.
const ATTEMPTS: usize = 3;

/// Adds a value to the sample of that name.
pub(crate) fn push(samples: &mut Samples, name: &str, value: f64) {
    samples.entry(name.to_owned()).or_default().push(value);
}

/// Tries a boot again when it fails. QEMU's emulation of SVM delivers an interrupt twice when its own timer expires
/// right after an injection (`helper_vmrun` leaves the vector in `exception_index`, and the loop around it takes that
/// for an exception); a guest whose tick this hits waits for its own lock for ever. No hardware does that.
pub(crate) fn retry<T>(mut boot: impl FnMut() -> Result<T>) -> Result<T> {
    let mut result = boot();
    for _ in 1..ATTEMPTS {
        if result.is_ok() {
            break;
        }
        result = boot();
    }
    result
}
