//! A device on the `vmm` thread, with its side of the transport.

use std::sync::Arc;

use event_manager::EventSet;

use crate::causes;
use crate::control::DeviceRequest;
use crate::virtio::device::{DeviceError, EventRegistry, Interrupt, Outcome, VirtioDevice};
use crate::virtio::pci::Lines;

/// A device and its side of the transport.
pub(crate) struct DeviceWorker {
    kind: &'static str,
    device: Box<dyn VirtioDevice>,
    lines: Arc<Lines>,
}

/// What a request did, as far as others want to know.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Effect {
    /// A driver of the guest has taken the device.
    Activated,
    /// Something else.
    Other,
}

impl DeviceWorker {
    pub(crate) fn new(kind: &'static str, device: Box<dyn VirtioDevice>, lines: Arc<Lines>) -> Self {
        Self { kind, device, lines }
    }

    pub(super) fn handle_request(&mut self, request: DeviceRequest, events: &mut dyn EventRegistry) -> Effect {
        match request {
            DeviceRequest::Activate(activation) => {
                let result = self.device.activate(activation, events);
                let activated = result.is_ok();
                self.settle(result, events);
                return if activated { Effect::Activated } else { Effect::Other };
            }
            DeviceRequest::Reset(done) => {
                self.device.reset(events);
                self.lines.set_config(self.device.config());
                drop(done);
            }
            DeviceRequest::WriteConfig { offset, data, done } => {
                self.device.write_config(offset, &data);
                self.lines.set_config(self.device.config());
                drop(done);
            }
        }
        Effect::Other
    }

    pub(super) fn handle_event(&mut self, token: u32, ready: EventSet, events: &mut dyn EventRegistry) {
        match self.device.handle_event(token, ready, events) {
            Ok(Outcome::Done) => {}
            Ok(Outcome::ConfigChanged) => {
                self.lines.set_config(self.device.config());
                self.lines.signal_config();
            }
            Err(error) => self.settle(Err(error), events),
        }
    }

    /// Takes the device from its rings; nothing of it is watched any more.
    pub(super) fn stop(&mut self, events: &mut dyn EventRegistry) {
        self.device.reset(events);
    }

    /// A device that failed is taken from its rings until the driver resets it.
    fn settle(&mut self, result: Result<(), DeviceError>, events: &mut dyn EventRegistry) {
        if let Err(error) = result {
            tracing::warn!(device = self.kind, error = %causes::joined(&error, ": "), "the device needs a reset by the guest");
            self.device.reset(events);
            self.lines.set_broken();
        }
        self.lines.set_config(self.device.config());
    }
}
