//! How large a sandbox's machine is: at its start, and as the limits of its containers come and go.
//!
//! As in Kata, a machine has the configured default and, on top of it, the sum of what its containers are limited to: the
//! CPU quotas as whole vCPUs, rounded up once, and the memory limits. A container without limits adds nothing. Room to
//! grow costs a guest time when it boots (about 7 ms for hot-plug, 1.5 ms for each vCPU that may come, and 2.5 ms for
//! pluggable memory), so a machine has it only where there is a reason to expect that it is needed.

use std::collections::HashMap;

use config::Config;
use dragonball::config::{MEMORY_GRANULE, VCPUS_MAX};
use serde_json::Value;

/// Millionths of a CPU: quotas of different periods add up without rounding each.
const MILLION: u64 = 1_000_000;
/// The kernel's default of `cpu.max` (microseconds).
const DEFAULT_PERIOD: u64 = 100_000;
/// vCPUs that a machine can grow to at least where it is to grow, and the configuration does not say to how many.
const ROOM: u8 = 4;

/// containerd's CRI tells the limits of a whole pod by these, Kubernetes 1.23 and later.
pub(crate) const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
pub(crate) const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub(crate) const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What a container, or all of a sandbox, is limited to. Zero stands for no limit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Millionths of a CPU.
    pub cpu: u64,
    /// Bytes.
    pub memory: u64,
}

impl Demand {
    /// What resources of the OCI runtime specification limit; what they do not name stays as in `before`.
    #[must_use]
    pub fn of(resources: &Value, before: Self) -> Self {
        let number = |group: &str, key: &str| resources.get(group).and_then(|group| group.get(key)?.as_i64());
        let quota = number("cpu", "quota");
        let cpu = quota.map(|quota| share(quota, number("cpu", "period").unwrap_or_default()));
        let memory = number("memory", "limit").map(|limit| u64::try_from(limit).unwrap_or_default());
        Self { cpu: cpu.unwrap_or(before.cpu), memory: memory.unwrap_or(before.memory) }
    }

    /// What an orchestrator says that a sandbox's containers will be limited to; nothing when it does not say.
    #[must_use]
    pub fn of_sandbox(annotations: &HashMap<String, String>) -> Option<Self> {
        let number = |key: &str| annotations.get(key).and_then(|text| text.trim().parse::<i64>().ok());
        let (period, quota, memory) = (number(SANDBOX_PERIOD), number(SANDBOX_QUOTA), number(SANDBOX_MEMORY));
        if quota.is_none() && memory.is_none() {
            return None;
        }
        let cpu = share(quota.unwrap_or_default(), period.unwrap_or_default());
        Some(Self { cpu, memory: memory.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default() })
    }

    fn plus(self, other: &Self) -> Self {
        Self { cpu: self.cpu.saturating_add(other.cpu), memory: self.memory.saturating_add(other.memory) }
    }

    /// What is enough for both.
    #[must_use]
    pub fn widest(self, other: Self) -> Self {
        // No limit is the least: it adds nothing.
        Self { cpu: self.cpu.max(other.cpu), memory: self.memory.max(other.memory) }
    }

    /// The sum of all.
    pub fn sum<'a>(demands: impl Iterator<Item = &'a Self>) -> Self {
        demands.fold(Self::default(), Self::plus)
    }
}

/// A quota in millionths of a CPU; negative ones stand for no limit.
fn share(quota: i64, period: i64) -> u64 {
    let period = u64::try_from(period).ok().filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    u64::try_from(quota).unwrap_or_default().saturating_mul(MILLION) / period
}

/// vCPUs and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// Bytes, a multiple of dragonball's granule.
    pub memory: u64,
}

/// What a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that are online.
    pub cpus: u8,
    /// The most memory that a guest can have, in bytes.
    pub memory: u64,
}

impl Host {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(1);
        Self { cpus: u8::try_from(cpus).unwrap_or(VCPUS_MAX).clamp(1, VCPUS_MAX), memory: dragonball::memory_limit() }
    }
}

/// Limits that a machine cannot satisfy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// More vCPUs than it may have.
    #[error(
        "the CPU limits of the sandbox's containers need {needed} vCPUs, of which {default} are `default_vcpus`; its \
         machine can have {max}: lower the limits, or raise `default_maxvcpus` in [hypervisor.dragonball] and create the \
         sandbox again"
    )]
    Vcpus {
        /// What the limits add up to, with the default.
        needed: u64,
        /// The default.
        default: u8,
        /// The most.
        max: u8,
    },
    /// More memory than it may have.
    #[error(
        "the memory limits of the sandbox's containers need {} MiB, of which {} MiB are `default_memory`; its machine can \
         have {} MiB: lower the limits, or raise `default_maxmemory` in [hypervisor.dragonball] and create the sandbox \
         again", needed >> 20, default >> 20, max >> 20
    )]
    Memory {
        /// What the limits add up to, with the default, in bytes.
        needed: u64,
        /// The default in bytes.
        default: u64,
        /// The most in bytes.
        max: u64,
    },
    /// A default above its own maximum.
    #[error("`{key}` in [hypervisor.dragonball] is below `default_{what}`: raise it, lower the other, or set it to 0")]
    Defaults {
        /// The maximum's key.
        key: &'static str,
        /// What the default is of.
        what: &'static str,
    },
}

/// The size of a machine, and what it can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// At the start, and without any container.
    pub boot: Size,
    /// At most.
    pub max: Size,
    host: Host,
    fixed: bool,
}

impl Range {
    /// What the machine of a sandbox is made with. `announced` is what is known of its containers' limits: nothing when
    /// they come later and nobody has said what they will be.
    ///
    /// # Errors
    ///
    /// [`SizeError`], when the announced limits are more than the configuration allows.
    pub fn plan(config: &Config, announced: Option<Demand>, host: Host) -> Result<Self, SizeError> {
        let hypervisor = &config.hypervisor;
        let boot = Size {
            vcpus: hypervisor.default_vcpus,
            memory: hypervisor.default_memory.next_multiple_of(MEMORY_GRANULE),
        };
        let (max_vcpus, max_memory) = (hypervisor.default_maxvcpus, hypervisor.default_maxmemory);
        if (1..boot.vcpus).contains(&max_vcpus) {
            return Err(SizeError::Defaults { key: "default_maxvcpus", what: "vcpus" });
        }
        if (1..hypervisor.default_memory).contains(&max_memory) {
            return Err(SizeError::Defaults { key: "default_maxmemory", what: "memory" });
        }
        let widest = Size {
            vcpus: if max_vcpus > 0 { max_vcpus } else { host.cpus.max(boot.vcpus) },
            memory: match max_memory {
                0 => host.memory,
                memory => memory.next_multiple_of(MEMORY_GRANULE).min(host.memory),
            }
            .max(boot.memory),
        };
        let wide = Self { boot, max: widest, host, fixed: false };
        if config.runtime.static_sandbox_resource_mgmt {
            let size = wide.target(announced.unwrap_or_default())?;
            return Ok(Self { boot: size, max: size, host, fixed: true });
        }
        let target = announced.map(|announced| wide.target(announced)).transpose()?;
        let grows = |of: fn(&Demand) -> u64| announced.is_none_or(|announced| of(&announced) > 0);
        let room = |target: Size| target.vcpus.saturating_mul(2).max(ROOM).min(widest.vcpus);
        let max = Size {
            vcpus: match target {
                _ if max_vcpus > 0 => max_vcpus,
                _ if !grows(|demand| demand.cpu) => boot.vcpus,
                target => room(target.unwrap_or(boot)),
            },
            memory: if max_memory > 0 || grows(|demand| demand.memory) { widest.memory } else { boot.memory },
        };
        Ok(Self { boot, max, host, fixed: false })
    }

    /// Whether vCPUs can come.
    #[must_use]
    pub fn vcpus_can_come(&self) -> bool {
        self.max.vcpus > self.boot.vcpus
    }

    /// The size for these limits. A machine that may have all that the host has gets no more than that, as a container of
    /// another runtime does; and one that was made without room, because no limits were announced, takes limits that it
    /// satisfies as it is.
    ///
    /// # Errors
    ///
    /// [`SizeError::Vcpus`] and [`SizeError::Memory`].
    pub fn target(&self, limits: Demand) -> Result<Size, SizeError> {
        if self.fixed {
            return Ok(self.boot);
        }
        let Self { boot, max, host, .. } = *self;
        let cpus = limits.cpu.div_ceil(MILLION);
        let needed = u64::from(boot.vcpus).saturating_add(cpus);
        let is_enough = |has_room: bool, limit: u64, max: u64, host: u64| max >= host || (!has_room && limit <= max);
        let vcpus = match u8::try_from(needed) {
            Ok(vcpus) if vcpus <= max.vcpus => vcpus,
            _ if is_enough(max.vcpus > boot.vcpus, cpus, max.vcpus.into(), host.cpus.into()) => max.vcpus,
            _ => return Err(SizeError::Vcpus { needed, default: boot.vcpus, max: max.vcpus }),
        };
        let needed = boot.memory.saturating_add(limits.memory);
        let memory = match needed.checked_next_multiple_of(MEMORY_GRANULE) {
            Some(memory) if memory <= max.memory => memory,
            _ if is_enough(max.memory > boot.memory, limits.memory, max.memory, host.memory) => max.memory,
            _ => return Err(SizeError::Memory { needed, default: boot.memory, max: max.memory }),
        };
        Ok(Size { vcpus, memory })
    }
}

#[cfg(test)]
mod tests;
