//! PCI: one flat bus, configuration space by ECAM only, interrupts by MSI-X only.

pub(crate) mod bus;
pub(crate) mod config;
pub(crate) mod config_page;
pub(crate) mod msix;
pub(crate) mod windows;

use std::sync::Arc;

use self::config_page::ConfigPage;
use crate::memory::layout::Range;

/// One function of a PCI device. The vCPUs call it side by side.
pub(crate) trait PciFunction: Send + Sync {
    /// Answers a read of configuration space from `register` on. Registers beyond the space read as zero.
    fn read_config(&self, register: u16, data: &mut [u8]);

    /// Takes a write to configuration space and says whether the addresses that it answers to may have changed.
    fn write_config(&self, register: u16, data: &[u8]) -> bool;

    /// Keeps `page` as its registers from now on; false for a function whose registers are not memory. Called before
    /// anybody can reach it.
    fn show_config(&self, _page: &Arc<ConfigPage>) -> bool {
        false
    }

    /// Leaves its page alone from now on. Does not wait for an access that is under way.
    fn leave_config(&self) {}

    /// The memory ranges that the function answers to now, with the number of the base address register of each.
    fn ranges(&self) -> Vec<(u8, Range)>;

    /// Answers a read of `bar` at `offset`.
    fn read_memory(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Takes a write to `bar` at `offset`.
    fn write_memory(&self, bar: u8, offset: u64, data: &[u8]);
}
