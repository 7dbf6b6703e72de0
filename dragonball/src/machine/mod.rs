//! Building a machine and starting it.

mod build;
mod devices;
mod event_loop;
mod hot_plug;
mod input;
mod memory_types;
mod vcpus;
mod worker;

use std::sync::Arc;

pub(crate) use devices::PreparedDevice;
pub(crate) use hot_plug::Retired;

use crate::boot::BootError;
use crate::config::{ConfigError, MachineConfig};
use crate::kvm::KvmError;
use crate::vm::{STAMP_START, Shared, Vm};

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM gives no machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device could not be made.
    #[error("The {device} device cannot be made")]
    Device {
        /// Which one.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host refused something else.
    #[error("The host refused to {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Starts a machine: it runs when this returns.
///
/// # Errors
/// When the configuration is refused, or the host or KVM does not give what the machine needs; nothing is left then.
#[expect(clippy::needless_pass_by_value, reason = "a machine that was started is no longer configured")]
pub fn start(config: MachineConfig) -> Result<Vm, StartError> {
    let host = |action| move |source| StartError::Host { action, source };
    let shared = Arc::new(Shared::new().map_err(host("make an event"))?);
    shared.stamp(STAMP_START);
    config.validate()?;
    build::build(&config, shared)
}
