//! What runs where KVM is (this host or the lab machine): starts VMs and containers, and answers with raw samples.

pub mod boot;
pub mod containers;
pub mod memory;
pub mod smaps;
pub mod trace;
pub mod vmm;

use std::collections::BTreeMap;

/// Samples by name: one vector of values per quantity, all of one length, so that values of one index are of one round.
pub type Samples = BTreeMap<String, Vec<f64>>;

/// Adds a value to the sample of that name.
pub(crate) fn push(samples: &mut Samples, name: &str, value: f64) {
    samples.entry(name.to_owned()).or_default().push(value);
}
