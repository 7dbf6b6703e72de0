//! Virtual processors: one thread each, which runs the guest and answers its accesses.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::control::{Control, Request};
use crate::threads;
use crate::vm::ExitReason;

pub(crate) mod cpuid;
mod kick;
mod memory_types;
pub(crate) mod registers;

pub(crate) use kick::install_handler;

/// A running vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    kicker: kick::Kicker,
    thread: JoinHandle<VcpuFd>,
}

/// What all vCPU threads of a machine share.
#[derive(Clone)]
pub(crate) struct Context {
    /// Where accesses go.
    pub(crate) bus: Arc<Bus>,
    /// Who learns of the end.
    pub(crate) control: Control,
    /// Set before the vCPUs are kicked to end.
    pub(crate) ending: Arc<AtomicBool>,
}

impl Vcpu {
    /// Starts the thread of vCPU `id`.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn start(id: usize, mut fd: VcpuFd, context: Context) -> io::Result<Self> {
        let run = kick::RunPage::of(&mut fd);
        let thread = threads::spawn(&format!("vcpu{id}"), move || {
            // The kicker needs the vCPU's page until the thread is joined, whatever happens here.
            let reason = catch_unwind(AssertUnwindSafe(|| run_until_end(&mut fd, &context)))
                .unwrap_or_else(|_| Some(ExitReason::Failed("a vCPU thread panicked: this is a bug".to_owned())));
            if let Some(reason) = reason {
                context.control.send(Request::End(reason));
            }
            fd
        })?;
        Ok(Self { kicker: kick::Kicker::new(run, &thread), thread })
    }

    /// Makes the vCPU leave the guest, so that it sees that the machine is ending.
    pub(crate) fn kick(&self) {
        self.kicker.kick();
    }

    /// Waits for the thread's end.
    pub(crate) fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a vCPU thread panicked");
        }
    }
}

/// Runs the guest; nothing when it was told to end, else why the guest cannot go on.
fn run_until_end(fd: &mut VcpuFd, context: &Context) -> Option<ExitReason> {
    loop {
        if context.ending.load(Ordering::Acquire) {
            return None;
        }
        match fd.run() {
            Ok(exit) => {
                let end = handle(exit, &context.bus);
                if end.is_some() {
                    return end;
                }
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) if error.errno() == libc::EFAULT => {
                return Some(failed(
                    fd,
                    "guest memory is gone: did the guest touch memory that it has given back, or was a mapped file truncated?",
                ));
            }
            Err(error) => return Some(failed(fd, &format!("KVM_RUN: {}", io::Error::from(error)))),
        }
        if let Some(reason) = internal_error(fd) {
            return Some(reason);
        }
    }
}

/// Answers an exit; gives the reason when it ends the machine.
fn handle(exit: VcpuExit<'_>, bus: &Bus) -> Option<ExitReason> {
    match exit {
        VcpuExit::IoOut(port, data) => return bus.write_port(port, data),
        VcpuExit::IoIn(port, data) => bus.read_port(port, data),
        VcpuExit::MmioRead(address, data) => bus.read_memory(address, data),
        VcpuExit::MmioWrite(address, data) => bus.write_memory(address, data),
        VcpuExit::IoapicEoi(vector) => bus.end_of_interrupt(vector),
        VcpuExit::Shutdown => return Some(ExitReason::TripleFault),
        VcpuExit::SystemEvent(kind, _) => return Some(system_event(kind)),
        VcpuExit::FailEntry(reason, cpu) => {
            return Some(ExitReason::Failed(format!(
                "the processor refused to enter the guest (hardware reason {reason:#x} on CPU {cpu})"
            )));
        }
        VcpuExit::MemoryFault { gpa, size, .. } => {
            return Some(ExitReason::Failed(format!(
                "guest memory at {gpa:#x} ({size} bytes) is gone: did the guest touch memory that it has given back, or \
                 was a mapped file truncated?"
            )));
        }
        // Told apart by the caller, which can read the registers.
        VcpuExit::InternalError => {}
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        other => return Some(ExitReason::Failed(format!("KVM gave an exit of an unknown kind: {other:?}"))),
    }
    None
}

fn system_event(kind: u32) -> ExitReason {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => ExitReason::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => ExitReason::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => ExitReason::Panic,
        other => ExitReason::Failed(format!("KVM reported a system event of unknown kind {other}")),
    }
}

/// What KVM itself failed at, when the last exit was that.
fn internal_error(fd: &mut VcpuFd) -> Option<ExitReason> {
    let run = fd.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: the exit reason says that this member of the union is the one that KVM filled.
    let kind = unsafe { run.__bindgen_anon_1.internal.suberror };
    let what = match kind {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction of the guest".to_owned(),
        other => format!("KVM met an internal error of kind {other}"),
    };
    Some(failed(fd, &what))
}

fn failed(fd: &VcpuFd, what: &str) -> ExitReason {
    let place = fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at instruction {:#x}", regs.rip));
    ExitReason::Failed(format!("{what}{place}"))
}
