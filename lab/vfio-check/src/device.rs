//! A device opened by VFIO: by its group and a type1 container, or by its own file and IOMMUFD.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use iommufd_ioctls::IommuFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioIommufd, VfioOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::Shared;

/// Most time that an interrupt may take, in milliseconds: an emulated machine on a busy host.
const INTERRUPT_LIMIT: u16 = 60_000;

/// How devices are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Way {
    /// `/dev/vfio/GROUP` and a type1 container
    Group,
    /// `/dev/vfio/devices/vfioN` and `/dev/iommu`
    Iommufd,
}

/// An opened device.
pub(crate) struct Device {
    device: VfioDevice,
    ops: Arc<dyn VfioOps>,
}

/// Memory that the device reaches at a bus address, until it is dropped.
pub(crate) struct Mapped {
    pub(crate) memory: Shared,
    address: u64,
    ops: Arc<dyn VfioOps>,
}

/// An interrupt of a device.
pub(crate) struct Interrupt(EventFd);

fn sysfs(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// A number that sysfs has of a device, as its vendor.
pub(crate) fn attribute(address: &str, name: &str) -> Result<u32> {
    let path = sysfs(address).join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    let digits = text.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).with_context(|| format!("{} holds {text:?}", path.display()))
}

/// The addresses of all devices in a device's IOMMU group, sorted.
pub(crate) fn group(address: &str) -> Result<Vec<String>> {
    let path = sysfs(address).join("iommu_group/devices");
    let entries = fs::read_dir(&path).with_context(|| format!("{address} is in no IOMMU group"))?;
    let mut members = Vec::new();
    for entry in entries {
        members.push(entry?.file_name().to_string_lossy().into_owned());
    }
    members.sort();
    Ok(members)
}

/// Gives a device to `vfio-pci`.
pub(crate) fn bind(address: &str) -> Result<()> {
    let dir = sysfs(address);
    if driver(&dir).as_deref() == Some("vfio-pci") {
        return Ok(());
    }
    let write = |path: &Path, text: &str| fs::write(path, text).with_context(|| format!("Cannot write {path:?}"));
    write(&dir.join("driver_override"), "vfio-pci")?;
    if driver(&dir).is_some() {
        write(&dir.join("driver/unbind"), address)?;
    }
    write(Path::new("/sys/bus/pci/drivers_probe"), address)?;
    match driver(&dir) {
        Some(driver) if driver == "vfio-pci" => Ok(()),
        other => bail!("{address} has the driver {other:?}; is vfio-pci there?"),
    }
}

fn driver(dir: &Path) -> Option<String> {
    fs::read_link(dir.join("driver")).ok()?.file_name().map(|name| name.to_string_lossy().into_owned())
}

impl Device {
    /// Opens devices that are bound to `vfio-pci`, all in one address space.
    pub(crate) fn open(addresses: &[&str], way: Way) -> Result<Vec<Self>> {
        let ops: Arc<dyn VfioOps> = match way {
            Way::Group => Arc::new(VfioContainer::new(None).context("Cannot open a container")?),
            Way::Iommufd => {
                let iommufd = Arc::new(IommuFd::new().context("Cannot open /dev/iommu")?);
                Arc::new(VfioIommufd::new(iommufd, None, None).context("Cannot make an address space")?)
            }
        };
        let open = |address: &&str| {
            let device = VfioDevice::new(&sysfs(address), Arc::clone(&ops), way == Way::Iommufd);
            let device = device.with_context(|| format!("Cannot open {address}"))?;
            Ok(Self { device, ops: Arc::clone(&ops) })
        };
        addresses.iter().map(open).collect()
    }

    /// Lets the device reach new memory at a bus address.
    pub(crate) fn map(&self, address: u64, size: usize) -> Result<Mapped> {
        let memory = Shared::anonymous(size)?;
        // SAFETY: the memory is only ever copied from and to, and is taken from the device before it goes.
        unsafe { self.ops.vfio_dma_map(address, size, memory.start()) }.context("Cannot map memory for DMA")?;
        Ok(Mapped { memory, address, ops: Arc::clone(&self.ops) })
    }

    /// Turns memory decoding and bus mastering on.
    pub(crate) fn enable(&self) {
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &[6, 0], 4);
    }

    /// Resets the device.
    pub(crate) fn reset(&self) {
        self.device.reset();
    }

    /// Bytes of a region, and whether it can be mapped.
    pub(crate) fn region(&self, index: u32) -> (u64, bool) {
        let mappable = self.device.get_region_flags(index) & VFIO_REGION_INFO_FLAG_MMAP != 0;
        (self.device.get_region_size(index), mappable)
    }

    /// Number of MSI and of MSI-X interrupts.
    pub(crate) fn interrupts(&self) -> (u32, u32) {
        let count = |index| self.device.get_irq_info(index).map_or(0, |irq| irq.count);
        (count(VFIO_PCI_MSI_IRQ_INDEX), count(VFIO_PCI_MSIX_IRQ_INDEX))
    }

    /// The last `size` bytes of a BAR.
    pub(crate) fn end_of_bar(&self, index: u32, size: usize) -> Result<Shared> {
        let (whole, mappable) = self.region(index);
        ensure!(mappable && whole >= size as u64, "BAR{index} of {whole:#x} bytes cannot be mapped");
        let offset = self.device.get_region_offset(index) + whole - size as u64;
        Shared::of_file(self.device.as_raw_fd(), offset, size)
    }

    pub(crate) fn read_u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.region_read(0, &mut bytes, offset);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn read_u64(&self, offset: u64) -> u64 {
        u64::from(self.read_u32(offset + 4)) << 32 | u64::from(self.read_u32(offset))
    }

    pub(crate) fn write_u32(&self, offset: u64, value: u32) {
        self.device.region_write(0, &value.to_le_bytes(), offset);
    }

    pub(crate) fn write_u64(&self, offset: u64, value: u64) {
        self.device.region_write(0, &value.to_le_bytes(), offset);
    }

    /// Takes all MSI-X vectors into use; answers one of them.
    pub(crate) fn msix(&self, vector: usize) -> Result<Interrupt> {
        let count = usize::try_from(self.interrupts().1)?;
        let mut eventfds = (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<Vec<_>, _>>()?;
        ensure!(vector < count, "There are {count} vectors only");
        self.device.enable_msix(eventfds.iter().collect()).context("Cannot enable MSI-X")?;
        Ok(Interrupt(eventfds.swap_remove(vector)))
    }

    /// Takes MSI into use.
    pub(crate) fn msi(&self) -> Result<Interrupt> {
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        self.device.enable_msi(vec![&eventfd]).context("Cannot enable MSI")?;
        Ok(Interrupt(eventfd))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(error) = self.ops.vfio_dma_unmap(self.address, self.memory.size()) {
            eprintln!("vfio-check: Cannot unmap {:#x}: {error}", self.address);
        }
    }
}

impl Interrupt {
    /// Waits until it has been raised; answers how often.
    pub(crate) fn wait(&self) -> Result<u64> {
        // SAFETY: the descriptor is open as long as the eventfd that it is borrowed from.
        let descriptor = unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) };
        let mut waited = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
        ensure!(
            poll(&mut waited, PollTimeout::from(INTERRUPT_LIMIT))? == 1,
            "No interrupt within {INTERRUPT_LIMIT} ms"
        );
        Ok(self.0.read()?)
    }
}
