//! Asking the vCPUs for their memory types.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::vcpus::Vcpus;
use crate::manage::{ChangeError, Reply};
use crate::vcpu::mtrr::VcpuMemoryTypes;

/// A question to all vCPUs that run, and the answers so far.
pub(super) struct Inquiry {
    awaited: BTreeSet<u8>,
    found: BTreeMap<u8, VcpuMemoryTypes>,
    reply: Reply<BTreeMap<u8, VcpuMemoryTypes>>,
}

impl Inquiry {
    /// Asks all.
    pub(super) fn start(vcpus: &Vcpus, reply: Reply<BTreeMap<u8, VcpuMemoryTypes>>) -> Self {
        let awaited = vcpus.running().into_iter().filter(|id| vcpus.ask_memory_types(*id)).collect();
        Self { awaited, found: BTreeMap::new(), reply }
    }

    /// One has answered. Gives the question back while others have not.
    pub(super) fn answered(mut self, id: u8, read: io::Result<VcpuMemoryTypes>) -> Option<Self> {
        match read {
            Ok(types) if self.awaited.remove(&id) => drop(self.found.insert(id, types)),
            Ok(_) => {}
            Err(source) => {
                self.reply.send(Err(ChangeError::Host { action: "read a vCPU's memory types", source }));
                return None;
            }
        }
        self.settled()
    }

    /// One has ended.
    pub(super) fn gone(mut self, id: u8) -> Option<Self> {
        self.awaited.remove(&id);
        self.settled()
    }

    fn settled(self) -> Option<Self> {
        if self.awaited.is_empty() {
            self.reply.send(Ok(self.found));
            return None;
        }
        Some(self)
    }
}
