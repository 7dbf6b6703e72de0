//! From the execution of a monitor's program to the first instruction of the guest's `/init`.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::trace::{Instance, await_init, moment_filter, time};
use super::vmm::Vmm;
use super::{Samples, push, retry};

/// One combination that is measured.
#[derive(Clone, Debug)]
pub struct Contender<'a> {
    /// Names the samples.
    pub name: String,
    /// The monitor.
    pub vmm: Vmm,
    /// The kernel that it boots.
    pub kernel: &'a Path,
}

/// Boots each contender once per round, one after the other: first a round that is thrown away (the page cache fills),
/// then `rounds` that count. A guest that does not get there within `limit` seconds is started again. Samples `NAME` are
/// milliseconds from exec to init, `NAME kernel` those from the kernel's entry to init.
///
/// # Errors
/// When a guest does not reach its `/init`.
pub fn measure(contenders: &[Contender<'_>], initrd: &Path, rounds: usize, limit: u16) -> Result<Samples> {
    let marks = Instance::new("tatami-marks", "kvm/kvm_cpuid", &moment_filter())?;
    let mut samples = Samples::new();
    for round in 0..=rounds {
        for contender in contenders {
            let (total, kernel) = retry(|| boot(contender, initrd, &marks, limit))
                .with_context(|| format!("{} does not boot", contender.name))?;
            if round > 0 {
                push(&mut samples, &contender.name, total);
                push(&mut samples, &format!("{} kernel", contender.name), kernel);
            }
        }
    }
    Ok(samples)
}

/// Milliseconds from exec to init, and from the kernel's entry to init.
fn boot(contender: &Contender<'_>, initrd: &Path, marks: &Instance, limit: u16) -> Result<(f64, f64)> {
    let filter = format!("filename == \"{}\"", contender.vmm.program());
    let execs = Instance::new("tatami-execs", "sched/sched_process_exec", &filter)?;
    let mut pipe = marks.pipe()?;
    let guest = contender.vmm.start(contender.kernel, initrd)?;
    let (entry, init) = await_init(&mut pipe, limit)?;
    drop(guest);
    let executed = execs.take()?.first().and_then(|line| time(line)).context("No exec was traced")?;
    Ok(((init - executed) * 1e3, (init - entry) * 1e3))
}
