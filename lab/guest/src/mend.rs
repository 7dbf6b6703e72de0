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
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `enum bpf_cmd`.
const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
/// `enum bpf_map_type`, `enum bpf_prog_type`.
const PERCPU_ARRAY: u32 = 6;
const RAW_TRACEPOINT: u32 = 17;
/// `enum bpf_func_id`.
const MAP_LOOKUP: i32 = 1;
const SEND_SIGNAL_THREAD: i32 = 117;

const LICENCE: &std::ffi::CStr = c"Apache-2.0";

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
        let injected = create_map()?;
        let note = attach(c"kvm_inj_virq", &load(&note_injection(&injected))?)?;
        let leave = attach(c"kvm_entry", &load(&leave_after_injection(&injected))?)?;
        Ok(Self { _programs: [note, leave] })
    }
}

/// An instruction (Linux's `Documentation/bpf/standardization/instruction-set.rst`): code, registers, offset, immediate.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: target | source << 4, offset, immediate }
}

const fn call(function: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, function)
}

/// `target = value`
const fn set(target: u8, value: i32) -> Instruction {
    instruction(0xb7, target, 0, 0, value)
}

const EXIT: Instruction = instruction(0x95, 0, 0, 0, 0);

/// `r0 = &injected[this CPU]`, or the end of the program
fn find(injected: &OwnedFd) -> [Instruction; 9] {
    const IS_MAP: u8 = 1;
    [
        instruction(0x62, 10, 0, -4, 0), // *(u32 *)(r10 - 4) = 0
        instruction(0x18, 1, IS_MAP, 0, injected.as_raw_fd()),
        instruction(0, 0, 0, 0, 0),     // the second half of the former
        instruction(0xbf, 2, 10, 0, 0), // r2 = r10
        instruction(0x07, 2, 0, 0, -4), // r2 += -4
        call(MAP_LOOKUP),
        instruction(0x55, 0, 0, 2, 0), // if r0 != 0, skip two
        set(0, 0),
        EXIT,
    ]
}

/// `injected = 1`
fn note_injection(injected: &OwnedFd) -> Vec<Instruction> {
    let mut program = find(injected).to_vec();
    program.extend([
        instruction(0x7a, 0, 0, 0, 1), // *(u64 *)r0 = 1
        set(0, 0),
        EXIT,
    ]);
    program
}

/// `if injected { injected = 0; send_signal_thread(0) }`
fn leave_after_injection(injected: &OwnedFd) -> Vec<Instruction> {
    let mut program = find(injected).to_vec();
    program.extend([
        instruction(0x79, 1, 0, 0, 0), // r1 = *(u64 *)r0
        instruction(0x15, 1, 0, 3, 0), // if r1 == 0, skip three
        instruction(0x7a, 0, 0, 0, 0), // *(u64 *)r0 = 0
        set(1, 0),
        call(SEND_SIGNAL_THREAD),
        set(0, 0),
        EXIT,
    ]);
    program
}

/// The beginning of `union bpf_attr` for `MAP_CREATE`.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

/// The same for `PROG_LOAD`.
#[repr(C)]
struct ProgramAttributes {
    kind: u32,
    instructions: u32,
    code: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
}

/// The same for `RAW_TRACEPOINT_OPEN`.
#[repr(C)]
struct TracepointAttributes {
    name: u64,
    program: u32,
    reserved: u32,
}

fn create_map() -> io::Result<OwnedFd> {
    let attributes = MapAttributes { kind: PERCPU_ARRAY, key_size: 4, value_size: 8, entries: 1, flags: 0 };
    // SAFETY: the attributes point to nothing.
    unsafe { bpf(MAP_CREATE, &attributes) }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = ProgramAttributes {
        kind: RAW_TRACEPOINT,
        instructions: u32::try_from(program.len()).map_err(io::Error::other)?,
        code: program.as_ptr() as u64,
        licence: LICENCE.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: code and licence are as long as said, and outlive the call.
    unsafe { bpf(PROG_LOAD, &attributes) }
}

/// Lets `program` run at each passage of a tracepoint, until the answer is closed.
fn attach(tracepoint: &std::ffi::CStr, program: &OwnedFd) -> io::Result<OwnedFd> {
    let program = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = TracepointAttributes { name: tracepoint.as_ptr() as u64, program, reserved: 0 };
    // SAFETY: the name ends with a zero and outlives the call.
    unsafe { bpf(RAW_TRACEPOINT_OPEN, &attributes) }
}

/// bpf(2), for commands that answer a descriptor.
///
/// # Safety
/// What the attributes point to must be valid for the command.
unsafe fn bpf<Attributes>(command: libc::c_long, attributes: &Attributes) -> io::Result<OwnedFd> {
    // SAFETY: the size is the attributes'; the kernel takes what is missing as zero. The rest is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<Attributes>()) };
    let descriptor = i32::try_from(result).map_err(io::Error::other)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
