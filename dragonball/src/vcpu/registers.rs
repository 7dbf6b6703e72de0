//! The registers that the first vCPU starts with.

use std::io;

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use memory_types::Mtrrs;

use super::mtrr;
use crate::boot::{Entry, LONG_MODE_GDT};
use crate::memory::layout::{BOOT_GDT, BOOT_PAGE_TABLES};

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// The bit of the flags register that is always set.
const FLAGS_RESERVED: u64 = 1 << 1;

/// `IA32_MISC_ENABLE` and its bit for fast string instructions, without which Linux avoids them.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// Sets the model-specific registers that every vCPU needs, and the memory types of `mtrrs`.
///
/// # Errors
/// When KVM refuses one that the guest cannot do without.
pub(crate) fn set_msrs(vcpu: &VcpuFd, mtrrs: &Mtrrs) -> io::Result<()> {
    mtrr::set(vcpu, mtrrs)?;
    let fast_strings = kvm_msr_entry { index: MISC_ENABLE, data: FAST_STRINGS, ..Default::default() };
    let entries = Msrs::from_entries(&[fast_strings]).map_err(|_| io::ErrorKind::InvalidInput)?;
    // A guest can do without, where KVM does not take it: it counts what it took.
    vcpu.set_msrs(&entries)?;
    Ok(())
}

/// Puts a vCPU that ran before into the state in which it waits for the guest to start it, with the memory types of
/// `mtrrs`. Starting it resets all other registers (Intel SDM vol. 3, §10.1.1), but for other model-specific ones, which
/// keep their values as on a real processor.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn await_start(vcpu: &VcpuFd, mtrrs: &Mtrrs) -> io::Result<()> {
    mtrr::set(vcpu, mtrrs)?;
    Ok(vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED })?)
}

/// Sets the registers for entering the kernel.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry) -> io::Result<()> {
    match entry {
        Entry::Pvh { address, start_info } => enter_pvh(vcpu, address, start_info),
        Entry::Linux64 { address, boot_params } => enter_linux_64(vcpu, address, boot_params),
    }
}

fn flat_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { base: 0, limit: u32::MAX, selector, type_, present: 1, s: 1, db: 1, g: 1, ..Default::default() }
}

/// Execute and read, accessed.
const CODE: u8 = 0xb;
/// Read and write, accessed.
const DATA: u8 = 0x3;

/// The state that the PVH boot protocol asks for: 32-bit protected mode, flat segments, no paging, interrupts off.
fn enter_pvh(vcpu: &VcpuFd, address: u32, start_info: u64) -> io::Result<()> {
    /// Busy 32-bit task state segment.
    const TASK: u8 = 0xb;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = flat_segment(0x08, CODE);
    let data = flat_segment(0x10, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: TASK, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)?;
    let regs = kvm_regs { rip: u64::from(address), rbx: start_info, rflags: FLAGS_RESERVED, ..Default::default() };
    Ok(vcpu.set_regs(&regs)?)
}

/// The state that the 64-bit boot protocol asks for (`boot.rst`): long mode with the boot page tables.
fn enter_linux_64(vcpu: &VcpuFd, address: u64, boot_params: u64) -> io::Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = kvm_segment { l: 1, db: 0, ..flat_segment(0x10, CODE) };
    let data = flat_segment(0x18, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&LONG_MODE_GDT) - 1).map_err(io::Error::other)?;
    sregs.cr3 = BOOT_PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    vcpu.set_sregs(&sregs)?;
    let regs = kvm_regs { rip: address, rsi: boot_params, rflags: FLAGS_RESERVED, ..Default::default() };
    Ok(vcpu.set_regs(&regs)?)
}
