//! Linux guests that change while they run. Needs hardware virtualization, and says that it is skipped unless
//! `TATAMI_TEST_KERNEL` names a guest kernel (`make guests` sets both up). Devices of the host are passed to guests where
//! `TATAMI_TEST_DEVICES` names some (`make test-vfio`).
//!
//! The guests have this process's standard streams while they start, so the tests run one after the other
//! (`RUST_TEST_THREADS=1`).

mod growth;
mod guest;
mod hot_plug;
mod memory;
mod memory_types;
mod passthrough;
