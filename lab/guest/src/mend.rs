//! Mends virtualization as QEMU's emulated CPUs have it, for as long as the command server runs.
//!
//! QEMU's `VMRUN` delivers the interrupt that it was told to inject and leaves its number behind as an exception that is
//! still to come (`helper_vmrun` sets `exception_index` and delivers by itself; seen in 10.0 to 11.1). Any end of a VM clears
//! it. When another thread of QEMU calls the CPU away before the VM has ended once, though, the interrupt is delivered a
//! second time, wherever the guest is then, its interrupts off or not: guests hang in a spin lock that they hold themselves,
//! or crash.
//!
//! So each entry that injects an interrupt shall be followed by an exit before the guest's first instruction. Two BPF
//! programs see to that: the first notes that the CPU is about to inject one (tracepoint `kvm_inj_virq`; a thread that moves
//! to another CPU afterwards begins its entry anew); the second, in the entry with the CPU's interrupts off (`kvm_entry`),
//! lets the CPU send itself an interrupt, which it takes as soon as it is in the guest. It does so by the helper
//! `bpf_send_signal_thread`, which is put off by such an interrupt; the signal 0 is none. Source: Linux's
//! `arch/x86/kvm/svm/svm.c`, `kernel/trace/bpf_trace.c` and `linux/bpf.h`.

use std::io;
use std::os::fd::OwnedFd;

use bpf::{Instruction, Map, code};

/// `enum bpf_map_type`, `enum bpf_prog_type`.
const PERCPU_ARRAY: u32 = 6;
const RAW_TRACEPOINT: u32 = 17;
/// `enum bpf_func_id`.
const SEND_SIGNAL_THREAD: i32 = 117;

/// What keeps the programs where they are; they go with it.
#[derive(Debug)]
pub(crate) struct Mend {
    _programs: [OwnedFd; 2],
}

impl Mend {
    /// Puts the programs in place.
    ///
    /// # Errors
    /// When the kernel has no KVM or no BPF programs for tracepoints, or the caller may not load them.
    pub(crate) fn put() -> io::Result<Self> {
        let injected = Map::new(PERCPU_ARRAY, 1)?;
        let note = bpf::load(RAW_TRACEPOINT, 0, &note_injection(&injected))?;
        let note = bpf::raw_tracepoint(c"kvm_inj_virq", &note)?;
        let leave = bpf::load(RAW_TRACEPOINT, 0, &leave_after_injection(&injected))?;
        let leave = bpf::raw_tracepoint(c"kvm_entry", &leave)?;
        Ok(Self { _programs: [note, leave] })
    }
}

/// `r0 = &injected[this CPU]`, or the end of the program
fn find(injected: &Map) -> Vec<Instruction> {
    let end = [Instruction::new(code::JUMP_IF_NOT_64, 0, 0, 2, 0), Instruction::set(0, 0), Instruction::EXIT];
    [injected.find(0).as_slice(), &end].concat()
}

/// `injected = 1`
fn note_injection(injected: &Map) -> Vec<Instruction> {
    let mut program = find(injected);
    program.extend([
        Instruction::new(code::STORE_DOUBLE, 0, 0, 0, 1), // *r0 = 1
        Instruction::set(0, 0),
        Instruction::EXIT,
    ]);
    program
}

/// `if injected { injected = 0; send_signal_thread(0) }`
fn leave_after_injection(injected: &Map) -> Vec<Instruction> {
    let mut program = find(injected);
    program.extend([
        Instruction::new(code::LOAD_DOUBLE, 1, 0, 0, 0),  // r1 = *r0
        Instruction::new(code::JUMP_IF, 1, 0, 3, 0),      // if r1 == 0, skip three
        Instruction::new(code::STORE_DOUBLE, 0, 0, 0, 0), // *r0 = 0
        Instruction::set(1, 0),
        Instruction::call(SEND_SIGNAL_THREAD),
        Instruction::set(0, 0),
        Instruction::EXIT,
    ]);
    program
}
