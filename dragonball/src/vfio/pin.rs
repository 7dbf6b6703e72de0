//! A device that interrupts by a level on a pin, for guests' drivers that know nothing newer. It does so only while neither
//! MSI nor MSI-X is on: the host lets a device interrupt in one way at a time.

use std::io;
use std::sync::Arc;

use super::host::{HostDevice, IrqKind};
use crate::irq::ioapic::IoApic;
use crate::irq::pci_pin;
use crate::irq::pin::PinSource;

/// The pin of a function.
pub(super) struct Pin {
    host: Arc<dyn HostDevice>,
    source: Arc<PinSource>,
    started: bool,
}

impl Pin {
    /// Pin `pin`, 1 to 4, of a function in `slot`. It is off.
    ///
    /// # Errors
    /// When there are no file descriptors left.
    pub(super) fn new(host: &Arc<dyn HostDevice>, ioapic: &Arc<IoApic>, slot: u8, pin: u8) -> io::Result<Self> {
        let device = Arc::clone(host);
        let go_on = move || {
            // Refused where the guest has switched to messages meanwhile: nothing is to go on then.
            if let Err(error) = device.unmask_pin() {
                tracing::debug!(device = device.name(), %error, "the pin stays masked");
            }
        };
        let source = PinSource::new(ioapic, pci_pin(slot, pin), Box::new(go_on))?;
        Ok(Self { host: Arc::clone(host), source, started: false })
    }

    /// What the `vmm` thread watches.
    pub(super) fn source(&self) -> &Arc<PinSource> {
        &self.source
    }

    /// Switches the pin on or off.
    pub(super) fn set(&mut self, on: bool) {
        if self.started == on {
            return;
        }
        let result = if on {
            self.host.set_events(IrqKind::Intx, 0, &[Some(self.source.event())])
        } else {
            self.host.stop_events(IrqKind::Intx)
        };
        self.started = on && result.is_ok();
        if !self.started {
            self.source.lower();
        }
        if let Err(error) = result {
            tracing::warn!(device = self.host.name(), on, %error, "the interrupt pin cannot be switched");
        }
    }
}
