//! Says whether this host's KVM runs guests by the CPU's own virtualization.
//!
//! That `/dev/kvm` exists says little: a KVM in software has it too, and boots no ordinary kernel. So three things
//! are looked at: what the CPU offers, which module serves the device, and how a small real guest runs.

mod guest;

use std::fmt;
use std::fs;
use std::path::Path;

use serde::Serialize;

pub use guest::{GuestError, GuestRun};

/// Instructions per second below which a guest's code is taken to be emulated. CPUs with virtualization reach ten
/// times this even nested and busy; interpreters a tenth.
pub const NATIVE_RATE: u64 = 50_000_000;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// Whether KVM runs guests by the CPU's own virtualization.
    pub hardware: bool,
    /// What the CPU offers: `vmx` (Intel), `svm` (AMD), or nothing.
    pub cpu: Option<&'static str>,
    /// The module that serves `/dev/kvm`, as `kvm_amd`.
    pub module: Option<String>,
    /// Instructions per second of a small guest in real mode, or none if it did not run.
    pub instructions_per_second: Option<u64>,
    /// Each finding as a sentence.
    pub findings: Vec<String>,
}

impl fmt::Display for Probe {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.hardware {
            "This host's KVM is hardware virtualization: suites run on the host itself."
        } else {
            "This host has no hardware virtualization: suites run in the lab machine."
        };
        write!(formatter, "{verdict}")?;
        self.findings.iter().try_for_each(|finding| write!(formatter, "\n  - {finding}"))
    }
}

/// Looks at this host.
#[must_use]
pub fn probe() -> Probe {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    judge(cpu_flag(&cpuinfo), loaded_module(Path::new("/sys/module")), guest::run())
}

/// The virtualization among the first CPU's flags.
fn cpu_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

/// The module that carries KVM's generic part on its back.
fn loaded_module(modules: &Path) -> Option<String> {
    let mut names: Vec<String> = fs::read_dir(modules)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    names.sort();
    names.into_iter().next()
}

fn judge(cpu: Option<&'static str>, module: Option<String>, run: Result<GuestRun, GuestError>) -> Probe {
    let mut findings = Vec::new();
    findings.push(match cpu {
        Some(flag) => format!("The CPU offers {flag}."),
        None => "The CPU offers neither vmx nor svm.".to_owned(),
    });
    let vendor = matches!(module.as_deref(), Some("kvm_amd" | "kvm_intel"));
    findings.push(match (&module, vendor) {
        (Some(module), true) => format!("The module {module} uses it."),
        (Some(module), false) => format!("KVM comes from the module {module}, which is not of a CPU's maker."),
        (None, _) => "No kvm_* module is loaded.".to_owned(),
    });
    let rate = run.as_ref().ok().map(|run| run.rate());
    let native = rate.is_some_and(|rate| rate >= NATIVE_RATE);
    findings.push(match (&run, native) {
        (Ok(run), true) => {
            format!("A small guest ran at {} million instructions per second: natively.", run.rate() / 1_000_000)
        }
        (Ok(run), false) => {
            let limit = NATIVE_RATE / 1_000_000;
            format!(
                "A small guest ran at {} million instructions per second, less than {limit}: its code is emulated.",
                run.rate() / 1_000_000
            )
        }
        (Err(error), _) => format!("No guest ran: {error}."),
    });
    let hardware = cpu.is_some() && vendor && native;
    Probe { hardware, cpu, module, instructions_per_second: rate, findings }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn run(instructions: u64) -> Result<GuestRun, GuestError> {
        Ok(GuestRun { instructions, time: Duration::from_secs(1) })
    }

    #[test]
    fn only_a_native_guest_on_the_makers_module_is_hardware() {
        let fast = NATIVE_RATE * 10;
        let cases = [
            (Some("svm"), Some("kvm_amd"), run(fast), true),
            (Some("vmx"), Some("kvm_intel"), run(fast), true),
            (None, Some("kvm_pvm"), run(4_000_000), false),
            (None, Some("kvm_pvm"), run(fast), false),
            (Some("svm"), Some("kvm_amd"), run(4_000_000), false),
            (Some("svm"), None, run(fast), false),
            (Some("svm"), Some("kvm_amd"), Err(GuestError::Stopped("Shutdown".to_owned())), false),
        ];
        for (cpu, module, run, hardware) in cases {
            let probe = judge(cpu, module.map(str::to_owned), run);
            assert_eq!(probe.hardware, hardware, "{probe}");
            assert_eq!(probe.findings.len(), 3);
        }
    }

    #[test]
    fn the_cpus_flags_are_read_as_words() {
        assert_eq!(cpu_flag("processor : 0\nflags\t\t: fpu svm_lock vmx sse\n"), Some("vmx"));
        assert_eq!(cpu_flag("flags\t\t: fpu svm\n"), Some("svm"));
        assert_eq!(cpu_flag("flags\t\t: fpu hypervisor svm_lock\nbugs: svm\n"), None);
    }

    #[test]
    fn this_host_is_judged_with_a_reason_for_each_finding() {
        let probe = probe();
        assert_eq!(probe.findings.len(), 3, "{probe}");
        assert!(probe.hardware <= probe.cpu.is_some(), "{probe}");
    }
}
