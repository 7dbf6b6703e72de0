//! Interrupts by a level on a pin of the IOAPIC that several sources share: the pins of PCI functions.
//!
//! A source is an event of the host. When it comes, the level goes up; when the guest has finished its interrupt, the level
//! goes down and the source is told to go on, which makes the event come again while its cause is still there. Source:
//! `linux/vfio.h`, `VFIO_IRQ_INFO_AUTOMASKED`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::ioapic::IoApic;

/// What shares a pin with others.
pub(crate) trait LevelSource: Send + Sync {
    /// Whether it holds the level up.
    fn is_high(&self) -> bool;

    /// The guest has finished an interrupt of the pin.
    fn ended(&self);
}

/// A source whose level goes up by an event.
pub(crate) struct PinSource {
    ioapic: Arc<IoApic>,
    pin: u8,
    event: EventFd,
    high: AtomicBool,
    go_on: Box<dyn Fn() + Send + Sync>,
}

impl PinSource {
    /// A source of `pin` that is told by `go_on` to tell again.
    ///
    /// # Errors
    /// When there are no file descriptors left.
    pub(crate) fn new(ioapic: &Arc<IoApic>, pin: u8, go_on: Box<dyn Fn() + Send + Sync>) -> io::Result<Arc<Self>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let source = Arc::new(Self { ioapic: Arc::clone(ioapic), pin, event, high: AtomicBool::new(false), go_on });
        ioapic.connect(pin, Arc::downgrade(&source) as _);
        Ok(source)
    }

    /// The event by which the level goes up.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Takes the event, if it has come.
    pub(crate) fn take_event(&self) {
        if self.event.read().is_ok() {
            self.set(true);
        }
    }

    /// Takes the level down, whatever its cause was.
    pub(crate) fn lower(&self) {
        // What has come meanwhile is of before.
        let _ = self.event.read();
        self.set(false);
    }

    fn set(&self, high: bool) {
        self.high.store(high, Ordering::SeqCst);
        self.ioapic.update(self.pin);
    }
}

impl AsRawFd for PinSource {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl LevelSource for PinSource {
    fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    fn ended(&self) {
        if self.high.swap(false, Ordering::SeqCst) {
            (self.go_on)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::irq::Message;
    use crate::irq::ioapic::MessageSink;

    const PIN: u8 = 1;
    const VECTOR: u8 = 0x41;

    #[derive(Default)]
    struct Sent(Mutex<usize>);

    impl MessageSink for Sent {
        fn send(&self, _message: Message) {
            *self.0.lock().unwrap() += 1;
        }
        fn watch_end(&self, _pin: u8, _message: Option<Message>) {}
    }

    struct Machine {
        sent: Arc<Sent>,
        ioapic: Arc<IoApic>,
        told: Arc<AtomicUsize>,
    }

    impl Machine {
        /// A guest that listens to the pin.
        fn new() -> Self {
            const LEVEL: u32 = 1 << 15;
            let sent = Arc::new(Sent::default());
            let ioapic = Arc::new(IoApic::new(Arc::clone(&sent) as _));
            ioapic.write(0, 0x10 + 2 * u32::from(PIN));
            ioapic.write(0x10, LEVEL | u32::from(VECTOR));
            Self { sent, ioapic, told: Arc::default() }
        }

        fn source(&self) -> Arc<PinSource> {
            let told = Arc::clone(&self.told);
            let go_on = move || {
                told.fetch_add(1, Ordering::SeqCst);
            };
            PinSource::new(&self.ioapic, PIN, Box::new(go_on)).unwrap()
        }

        fn sent(&self) -> usize {
            *self.sent.0.lock().unwrap()
        }

        fn told(&self) -> usize {
            self.told.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn an_event_interrupts_once_and_its_source_goes_on_at_the_end() {
        let machine = Machine::new();
        let source = machine.source();
        source.take_event();
        assert_eq!(machine.sent(), 0, "nothing has come");
        source.event().write(1).unwrap();
        source.take_event();
        source.take_event();
        assert_eq!((machine.sent(), machine.told()), (1, 0));
        machine.ioapic.end_of_interrupt(VECTOR);
        assert_eq!((machine.sent(), machine.told()), (1, 1), "the level went down");
        machine.ioapic.end_of_interrupt(VECTOR);
        assert_eq!(machine.told(), 1);
        source.event().write(1).unwrap();
        source.take_event();
        assert_eq!(machine.sent(), 2, "its cause is still there");
    }

    #[test]
    fn sources_of_one_pin_do_not_take_each_other_down() {
        let machine = Machine::new();
        let (one, other) = (machine.source(), machine.source());
        for source in [&one, &other] {
            source.event().write(1).unwrap();
            source.take_event();
        }
        one.lower();
        machine.ioapic.end_of_interrupt(VECTOR);
        assert_eq!((machine.sent(), machine.told()), (1, 1), "the other one was told to go on");
        one.event().write(1).unwrap();
        one.take_event();
        drop(other);
        machine.ioapic.end_of_interrupt(VECTOR);
        assert_eq!((machine.sent(), machine.told()), (2, 2));
    }
}
