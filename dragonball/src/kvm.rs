//! `/dev/kvm`: a virtual machine with what every machine of ours needs of it.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::irq::ioapic::PINS;
use crate::memory::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// How often a signal may interrupt the making of a VM before that counts as a failure: each try starts again.
const CREATE_TRIES: usize = 5;

/// What KVM must be able to do.
const REQUIRED: [(Cap, &str); 5] = [
    (Cap::Irqchip, "in-kernel local APICs"),
    (Cap::SplitIrqchip, "a split interrupt controller"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::UserMemory, "user memory"),
];

/// Why KVM gives no machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm cannot be opened: check that virtualization is on and that this user may open it")]
    Open(#[source] io::Error),
    /// KVM lacks something.
    #[error("KVM on this host has no {0}: use a host kernel from version 4.5 on, with KVM's modules of that kernel")]
    Missing(&'static str),
    /// KVM refused.
    #[error("KVM refused to {action}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// KVM's answer.
        #[source]
        source: io::Error,
    },
}

/// Turns KVM's answer into an error that says what was tried.
pub(crate) fn refused<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> KvmError {
    move |error| KvmError::Refused { action, source: error.into() }
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// When that is impossible, or KVM lacks something.
pub(crate) fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
    match REQUIRED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(KvmError::Missing(name)),
        None => Ok(kvm),
    }
}

/// Makes a VM with local APICs in the kernel and everything else of interrupts in this process.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, KvmError> {
    let mut tries = 1;
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR && tries < CREATE_TRIES => tries += 1,
            Err(error) => return Err(refused("create a VM")(error)),
        }
    };
    // Both are for Intel processors that cannot run real mode; KVM wants them before the first vCPU.
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(refused("place its identity map"))?;
    vm.set_tss_address(KVM_TSS).map_err(refused("place its task state segment"))?;

    let enable = |cap, argument| {
        let mut request = kvm_enable_cap { cap, ..Default::default() };
        request.args[0] = argument;
        vm.enable_cap(&request)
    };
    enable(KVM_CAP_SPLIT_IRQCHIP, u64::from(PINS)).map_err(refused("split the interrupt controller"))?;
    // Without it, a processor with APIC id 255 could not be told from a broadcast; no machine of ours has one.
    let wide_ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    let _ = enable(KVM_CAP_X2APIC_API, u64::from(wide_ids));
    Ok(Arc::new(vm))
}
