//! Routes of global system interrupts: an eventfd raises an interrupt number, KVM turns it into a message.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::Message;
use super::ioapic::PINS;

/// A global system interrupt: the number of a route.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Gsi(u32);

impl Gsi {
    /// The number as KVM has it.
    pub(crate) const fn number(self) -> u32 {
        self.0
    }
}

/// KVM takes up to 4096 routes; the IOAPIC's pins come first.
const GSI_END: u32 = 4096;

/// Gives out interrupt numbers and tells KVM where each one goes. Shared by all interrupt sources of a machine.
#[derive(Debug)]
pub(crate) struct IrqRouter {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

#[derive(Debug, Default)]
struct Routes {
    /// Every number that was given out, with its message once it has one.
    messages: BTreeMap<Gsi, Option<Message>>,
    /// The IOAPIC's level-triggered pins: KVM learns from them which ends of interrupts we want to see.
    pins: BTreeMap<u8, Message>,
}

impl IrqRouter {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::default() }
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a free number; it goes nowhere until [`Self::route`].
    ///
    /// # Errors
    /// When all are taken.
    pub(crate) fn allocate(&self) -> io::Result<Gsi> {
        let mut routes = self.routes();
        let free = (u32::from(PINS)..GSI_END).map(Gsi).find(|gsi| !routes.messages.contains_key(gsi));
        let gsi = free.ok_or_else(|| io::Error::other("all 4096 interrupt routes of the machine are taken"))?;
        routes.messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives a number back.
    pub(crate) fn release(&self, gsi: Gsi) {
        // Its route stays in KVM until the next change, without a source.
        self.routes().messages.remove(&gsi);
    }

    /// Sends each number to its message. One call costs KVM about as much as one change: give all changes together.
    ///
    /// # Errors
    /// When KVM refuses; nothing has changed then.
    pub(crate) fn route(&self, changes: &[(Gsi, Message)]) -> io::Result<()> {
        let mut routes = self.routes();
        let before: Vec<_> = changes.iter().map(|(gsi, _)| (*gsi, routes.messages.get(gsi).copied())).collect();
        routes.messages.extend(changes.iter().map(|(gsi, message)| (*gsi, Some(*message))));
        self.apply(&routes).inspect_err(|_| {
            for (gsi, message) in before {
                match message {
                    Some(message) => routes.messages.insert(gsi, message),
                    None => routes.messages.remove(&gsi),
                };
            }
        })
    }

    /// Sets or clears the message of a level-triggered IOAPIC pin.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn route_pin(&self, pin: u8, message: Option<Message>) -> io::Result<()> {
        let mut routes = self.routes();
        let changed = match message {
            Some(message) => routes.pins.insert(pin, message) != Some(message),
            None => routes.pins.remove(&pin).is_some(),
        };
        if changed { self.apply(&routes) } else { Ok(()) }
    }

    fn apply(&self, routes: &Routes) -> io::Result<()> {
        let pins = routes.pins.iter().map(|(pin, message)| entry(u32::from(*pin), *message));
        let messages = routes.messages.iter().filter_map(|(gsi, message)| Some(entry(gsi.0, (*message)?)));
        let entries: Vec<_> = pins.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }

    /// Lets `event` raise `gsi`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn attach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        Ok(self.vm.register_irqfd(event, gsi.0)?)
    }

    /// Ends that.
    ///
    /// # Errors
    /// When `event` was not attached to `gsi`.
    pub(crate) fn detach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(event, gsi.0)?)
    }

    /// Raises an interrupt at once, without a route.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn send(&self, message: Message) -> io::Result<()> {
        let (address_lo, address_hi) = halves(message.address);
        self.vm.signal_msi(kvm_msi { address_lo, address_hi, data: message.data, ..Default::default() })?;
        Ok(())
    }
}

fn halves(address: u64) -> (u32, u32) {
    let bytes = address.to_le_bytes();
    let half = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    (half(0), half(4))
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let (address_lo, address_hi) = halves(message.address);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo,
                address_hi,
                data: message.data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
            },
        },
        ..Default::default()
    }
}
