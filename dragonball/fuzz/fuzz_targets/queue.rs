//! The ring itself, with the entropy device behind it, which has no format of its own to get stuck at.
#![no_main]

use dragonball::virtio::rng::Rng;
use dragonball::virtio::testing::Harness;
use dragonball::virtio::testing::script::{Script, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| run(&mut Harness::new(Rng::new()), Script::new(bytes), |_, _| {}));
