//! Interrupts of a device without a driver: they are sent to a vector that the guest's kernel already has a handler for,
//! which counts them in `/proc/interrupts`.
//!
//! The vector is one of a virtio device: what it sends to its change of configuration, which happens next to never. Its
//! message is read from the virtio device's own table of MSI-X and given to the device that is tried. Source: PCI Local Bus
//! Specification 3.0, §6.8.

use std::fs;

use crate::memory::PAGE;
use crate::pci::Function;

const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;
const VIRTIO: u16 = 0x1af4;
/// The most looks at the counters until an interrupt has arrived.
const LOOKS: u32 = 5000;

/// A vector with a handler.
pub(crate) struct Counted {
    irq: u32,
    address: u64,
    data: u32,
}

impl Counted {
    /// Finds one.
    pub(crate) fn find() -> Result<Self, String> {
        let functions = Function::all().map_err(|error| error.to_string())?;
        let mut candidates = functions.iter().filter(|function| function.id().0 == VIRTIO);
        candidates.find_map(Self::of).ok_or_else(|| "no virtio device interrupts by MSI-X".to_owned())
    }

    /// The first vector of a function that its driver uses.
    fn of(function: &Function) -> Option<Self> {
        let mut irqs: Vec<u32> = fs::read_dir(function.file("msi_irqs"))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().to_string_lossy().parse().ok())
            .collect();
        irqs.sort_unstable();
        let table = function.config_32(function.capability(MSIX)? + 4)?;
        let (bar, offset) = (table & 7, u64::from(table & !7));
        let page = offset / PAGE as u64 * PAGE as u64;
        let table = function.map(&format!("resource{bar}"), page, PAGE).ok()?;
        let entry = usize::try_from(offset - page).ok()?;
        let (address, data) = (table.read_64(entry), table.read(entry + 8));
        (address != 0).then_some(Self { irq: *irqs.first()?, address, data })
    }

    /// How often it came so far, over all vCPUs.
    fn count(&self) -> Option<u64> {
        let text = fs::read_to_string("/proc/interrupts").ok()?;
        let name = format!("{}:", self.irq);
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(name.as_str()))?;
        Some(line.split_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok()).sum())
    }

    /// Does something that raises an interrupt and waits until it has come.
    pub(crate) fn expect(&self, what: &str, raise: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let before = self.count().ok_or("the kernel does not count the vector")?;
        raise()?;
        let came = (0..LOOKS).any(|_| self.count().is_some_and(|count| count > before));
        if came { Ok(()) } else { Err(format!("no interrupt by {what} came")) }
    }

    /// Lets a function with MSI send its first message here, for as long as `action` runs.
    pub(crate) fn with_msi<T>(
        &self,
        function: &Function,
        action: impl FnOnce() -> Result<T, String>,
    ) -> Result<T, String> {
        const WIDE: u16 = 1 << 7;
        const ENABLE: u16 = 1;
        let missing = || "it has no MSI".to_owned();
        let at = function.capability(MSI).ok_or_else(missing)?;
        let control = function.config_16(at + 2).ok_or_else(missing)?;
        let explain = |error: std::io::Error| format!("MSI cannot be set up: {error}");
        let data = at + if control & WIDE == 0 { 8 } else { 12 };
        // Below 4 GiB, as all addresses of local APICs are.
        let [a, b, c, d, ..] = self.address.to_le_bytes();
        function.set_config(at + 4, &[a, b, c, d]).map_err(explain)?;
        if control & WIDE != 0 {
            function.set_config(at + 8, &[0; 4]).map_err(explain)?;
        }
        let [low, high, ..] = self.data.to_le_bytes();
        function.set_config(data, &[low, high]).map_err(explain)?;
        function.set_config(at + 2, &(control | ENABLE).to_le_bytes()).map_err(explain)?;
        let result = action();
        function.set_config(at + 2, &(control & !ENABLE).to_le_bytes()).map_err(explain)?;
        result
    }

    /// Lets vector `vector` of a function with MSI-X send its message here, for as long as `action` runs.
    pub(crate) fn with_msix<T>(
        &self,
        function: &Function,
        vector: u64,
        action: impl FnOnce() -> Result<T, String>,
    ) -> Result<T, String> {
        const ENTRY: u64 = 16;
        const ENABLE: u16 = 1 << 15;
        let missing = || "it has no MSI-X".to_owned();
        let at = function.capability(MSIX).ok_or_else(missing)?;
        let table = function.config_32(at + 4).ok_or_else(missing)?;
        let entry = u64::from(table & !7) + ENTRY * vector;
        let page = entry / PAGE as u64 * PAGE as u64;
        let registers = function.map(&format!("resource{}", table & 7), page, PAGE)?;
        let entry = usize::try_from(entry - page).map_err(|error| error.to_string())?;
        registers.write_64(entry, self.address);
        registers.write(entry + 8, self.data);
        registers.write(entry + 12, 0);
        let control = function.config_16(at + 2).ok_or_else(missing)?;
        let explain = |error: std::io::Error| format!("MSI-X cannot be set up: {error}");
        function.set_config(at + 2, &(control | ENABLE).to_le_bytes()).map_err(explain)?;
        let result = action();
        registers.write(entry + 12, 1);
        function.set_config(at + 2, &(control & !ENABLE).to_le_bytes()).map_err(explain)?;
        result
    }
}
