//! Virtual processors: one thread each, which runs the guest and answers its accesses.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::control::{Control, Request, VcpuEvent};
use crate::threads;
use crate::vm::ExitReason;

pub(crate) mod cpuid;
mod kick;
pub(crate) mod mtrr;
pub(crate) mod registers;

pub(crate) use kick::install_handler;

/// What a vCPU is told to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    /// Run the guest.
    Run = 0,
    /// Stand still until there is another order.
    Pause = 1,
    /// End.
    Stop = 2,
}

/// The last order, with its number: the same order given twice is two orders.
#[derive(Debug, Default)]
struct Orders {
    last: AtomicU32,
    /// The vCPU shall say which memory types it has, whatever else it does.
    asked: AtomicBool,
}

impl Orders {
    const KIND: u32 = 3;

    fn give(&self, order: Order) {
        let next = |last: u32| Some((last | Self::KIND).wrapping_add(1) | order as u32);
        // Always gives a next one.
        let _ = self.last.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
    }

    /// The order and what tells it from all others.
    fn last(&self) -> (Order, u32) {
        let last = self.last.load(Ordering::SeqCst);
        let order = match last & Self::KIND {
            0 => Order::Run,
            1 => Order::Pause,
            _ => Order::Stop,
        };
        (order, last)
    }
}

/// A vCPU and its thread.
#[derive(Debug)]
pub(crate) struct Vcpu {
    orders: Arc<Orders>,
    kicker: kick::Kicker,
    thread: JoinHandle<VcpuFd>,
}

/// What all vCPU threads of a machine share.
#[derive(Clone)]
pub(crate) struct Context {
    /// Where accesses go.
    pub(crate) bus: Arc<Bus>,
    /// Who learns of ends and answers.
    pub(crate) control: Control,
}

impl Vcpu {
    /// Starts the thread of vCPU `id`.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub(crate) fn start(id: u8, mut fd: VcpuFd, context: Context) -> io::Result<Self> {
        // Set when the thread that had it before was stopped.
        fd.set_kvm_immediate_exit(0);
        let run = kick::RunPage::of(&mut fd);
        let orders = Arc::new(Orders::default());
        let obeyed = Arc::clone(&orders);
        let thread = threads::spawn(&format!("vcpu{id}"), move || {
            // The kicker needs the vCPU's page until the thread is joined, whatever happens here.
            let reason = catch_unwind(AssertUnwindSafe(|| run_until_end(id, &mut fd, &obeyed, &context)))
                .unwrap_or_else(|_| Some(ExitReason::Failed("a vCPU thread panicked: this is a bug".to_owned())));
            context.control.send(match reason {
                Some(reason) => Request::End(reason),
                None => Request::Vcpu { id, event: VcpuEvent::Stopped },
            });
            fd
        })?;
        Ok(Self { orders, kicker: kick::Kicker::new(run, &thread), thread })
    }

    fn order(&self, order: Order) {
        self.orders.give(order);
        self.wake();
    }

    fn wake(&self) {
        self.kicker.kick();
        self.thread.thread().unpark();
    }

    /// Makes the vCPU stand still; it answers when it does.
    pub(crate) fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Lets it run again.
    pub(crate) fn resume(&self) {
        self.order(Order::Run);
    }

    /// Asks for its memory types; it answers with an event, standing still or not.
    pub(crate) fn ask_memory_types(&self) {
        self.orders.asked.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Makes its thread end; it answers when it is about to.
    pub(crate) fn stop(&self) {
        self.order(Order::Stop);
    }

    /// Waits for the thread's end and gives the vCPU back; nothing when the thread panicked.
    pub(crate) fn join(self) -> Option<VcpuFd> {
        let fd = self.thread.join().ok();
        if fd.is_none() {
            tracing::error!("a vCPU thread panicked");
        }
        fd
    }
}

/// Runs the guest; nothing when it was told to end, else why the guest cannot go on.
fn run_until_end(id: u8, fd: &mut VcpuFd, orders: &Orders, context: &Context) -> Option<ExitReason> {
    loop {
        answer_question(id, fd, orders, context);
        match orders.last() {
            (Order::Run, _) => {}
            (Order::Pause, number) => {
                stand_still(id, fd, (orders, number), context);
                continue;
            }
            (Order::Stop, _) => return None,
        }
        match fd.run() {
            Ok(exit) => {
                let end = handle(exit, &context.bus);
                if end.is_some() {
                    return end;
                }
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                // A kick has been obeyed once its order is looked at again, which comes next: in this order, so that a
                // kick in between is seen either here or by KVM.
                fd.set_kvm_immediate_exit(0);
            }
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

/// Waits for another order. The exit before may have been an access whose answer is not in the vCPU's registers yet: it
/// is put there by entering KVM once more, with an immediate exit.
fn stand_still(id: u8, fd: &mut VcpuFd, (orders, number): (&Orders, u32), context: &Context) {
    fd.set_kvm_immediate_exit(1);
    // Always interrupted; whatever else is wrong shows at the next run.
    let _ = fd.run();
    context.control.send(Request::Vcpu { id, event: VcpuEvent::Paused });
    while orders.last().1 == number {
        answer_question(id, fd, orders, context);
        std::thread::park();
    }
    fd.set_kvm_immediate_exit(0);
}

/// Says which memory types the vCPU has, when that was asked: only its own thread can read its registers at any time.
fn answer_question(id: u8, fd: &VcpuFd, orders: &Orders, context: &Context) {
    if orders.asked.load(Ordering::Relaxed) && orders.asked.swap(false, Ordering::SeqCst) {
        let read = mtrr::get(fd).map(Box::new);
        context.control.send(Request::Vcpu { id, event: VcpuEvent::MemoryTypes(read) });
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
