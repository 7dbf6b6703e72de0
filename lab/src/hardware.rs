//! What a machine can have beyond the plain one: an IOMMU, devices to pass on to its guests, and another kernel.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Error;

/// Largest size of a device's memory: half of what 46 address bits leave for eight ports.
const LARGEST: u64 = 1 << 40;
/// Most devices: as many ports.
const MOST: usize = 8;

/// A device behind the IOMMU. Each is the only one in its IOMMU group, but for [`Self::AtiAndEdu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// QEMU's teaching device (1234:11e8): registers, factorials, DMA, MSI and INTx. Its DMA reaches all 64 bits.
    Edu,
    /// An NVMe disk of 1 GiB, empty; 64 MSI-X vectors.
    Nvme,
    /// Shared memory (1af4:1110) of this many bytes as a 64-bit prefetchable BAR.
    Ivshmem(u64),
    /// QEMU's test device (1b36:0005) with a 64-bit prefetchable BAR of this many bytes that nothing lies behind.
    TestDevice(u64),
    /// One device of two functions in one IOMMU group: ATI graphics (1002:5046) and [`Self::Edu`].
    AtiAndEdu,
    /// The model of a datacenter GPU (package `gpu-model`, 10de:20b0) with this many bytes of video memory.
    Gpu(u64),
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Edu => formatter.write_str("edu"),
            Self::Nvme => formatter.write_str("nvme"),
            Self::Ivshmem(size) => write!(formatter, "ivshmem:{}M", size >> 20),
            Self::TestDevice(size) => write!(formatter, "testdev:{}M", size >> 20),
            Self::AtiAndEdu => formatter.write_str("ati+edu"),
            Self::Gpu(size) => write!(formatter, "gpu:{}M", size >> 20),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Device(text.to_owned());
        let (kind, size) = text.split_once(':').map_or((text, None), |(kind, size)| (kind, Some(size)));
        let sized = |default: u64| match size {
            None => Ok(default),
            Some(size) => bytes(size).ok_or_else(bad),
        };
        match (kind, size) {
            ("edu", None) => Ok(Self::Edu),
            ("nvme", None) => Ok(Self::Nvme),
            ("ati+edu", None) => Ok(Self::AtiAndEdu),
            ("ivshmem", _) => Ok(Self::Ivshmem(sized(4 << 30)?)),
            ("testdev", _) => Ok(Self::TestDevice(sized(64 << 30)?)),
            ("gpu", _) => Ok(Self::Gpu(sized(8 << 30)?)),
            _ => Err(bad()),
        }
    }
}

/// A size that a BAR can have, as `256M` or `8G`.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix('G') {
        Some(digits) => (digits, 30),
        None => (text.strip_suffix('M')?, 20),
    };
    let number: u64 = digits.parse().ok()?;
    let bytes = number.checked_mul(1 << shift)?;
    (bytes.is_power_of_two() && bytes <= LARGEST).then_some(bytes)
}

/// What a machine runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's, as in the snapshots: VFIO with groups and type1 containers.
    #[default]
    Debian,
    /// One that is built from Debian's source with IOMMUFD, and VFIO devices as files of their own.
    Iommufd,
}

impl FromStr for Kernel {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "debian" => Ok(Self::Debian),
            "iommufd" => Ok(Self::Iommufd),
            _ => Err(Error::Kernel(name.to_owned())),
        }
    }
}

/// Devices behind an IOMMU, the kernel that drives them, and how much memory there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    devices: Vec<Device>,
    kernel: Kernel,
    memory: Option<u32>,
}

impl Hardware {
    /// An IOMMU with nothing behind it yet, and Debian's kernel.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device; it is the `n`th one's function 0 that [`Self::address`] gives.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Chooses the kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Chooses how much memory there is, in MiB; what the snapshot has where it is not chosen.
    #[must_use]
    pub fn memory(mut self, mebibytes: u32) -> Self {
        self.memory = Some(mebibytes);
        self
    }

    /// The memory in MiB, where it was chosen.
    #[must_use]
    pub fn chosen_memory(&self) -> Option<u32> {
        self.memory
    }

    /// All devices.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The kernel.
    #[must_use]
    pub fn chosen_kernel(&self) -> Kernel {
        self.kernel
    }

    /// The PCI address of the device that was added as number `index`, from 0, in the machine.
    #[must_use]
    pub fn address(index: usize) -> String {
        format!("0000:{:02x}:00.0", index + 1)
    }

    /// Whether a machine can have this.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.devices.len() <= MOST { Ok(()) } else { Err(Error::Devices { most: MOST, found: self.devices.len() }) }
    }

    /// Whether a device of it is a GPU model.
    pub(crate) fn has_models(&self) -> bool {
        self.devices.iter().any(|device| matches!(device, Device::Gpu(_)))
    }

    /// What the kernel is told.
    pub(crate) fn kernel_options() -> &'static str {
        " intel_iommu=on iommu=pt"
    }
}

/// Files of a machine's devices; the one of device number `index` is its own.
pub(crate) trait DeviceFiles {
    /// The socket of a GPU model.
    fn model_socket(&self, index: usize) -> PathBuf;
    /// The content of a disk.
    fn device_disk(&self, index: usize) -> PathBuf;
}

/// QEMU's options, name and value, for the IOMMU, a port for each device, and the devices.
pub(crate) fn options(hardware: &Hardware, files: &impl DeviceFiles) -> Vec<(&'static str, String)> {
    let mut options = vec![("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on".to_owned())];
    // The firmware makes each port's address windows as large as what is behind it needs.
    for number in 1..=hardware.devices.len() {
        let port = format!("pcie-root-port,id=port{},bus=pcie.0,chassis={number},slot={number}", number - 1);
        options.push(("-device", port));
    }
    for (index, device) in hardware.devices.iter().enumerate() {
        options.extend(device_options(*device, index, files));
    }
    options
}

fn device_options(device: Device, index: usize, files: &impl DeviceFiles) -> Vec<(&'static str, String)> {
    const EDU: &str = "edu,dma_mask=0xffffffffffffffff";
    let path = |path: PathBuf| path.to_string_lossy().replace(',', ",,");
    match device {
        Device::Edu => vec![("-device", format!("{EDU},bus=port{index}"))],
        Device::Nvme => {
            let disk = path(files.device_disk(index));
            vec![
                ("-drive", format!("if=none,id=nvme{index},format=raw,cache=unsafe,discard=unmap,file={disk}")),
                ("-device", format!("nvme,drive=nvme{index},serial=lab-{index},bus=port{index}")),
            ]
        }
        Device::Ivshmem(size) => vec![
            ("-object", format!("memory-backend-memfd,id=shared{index},share=on,size={}M", size >> 20)),
            ("-device", format!("ivshmem-plain,memdev=shared{index},bus=port{index}")),
        ],
        Device::TestDevice(size) => vec![("-device", format!("pci-testdev,membar={}M,bus=port{index}", size >> 20))],
        Device::AtiAndEdu => vec![
            ("-device", format!("ati-vga,bus=port{index},addr=0.0,multifunction=on")),
            ("-device", format!("{EDU},bus=port{index},addr=0.1")),
        ],
        Device::Gpu(_) => {
            let socket = serde_json::json!({ "type": "unix", "path": files.model_socket(index) });
            let bus = format!("port{index}");
            vec![(
                "-device",
                serde_json::json!({ "driver": "vfio-user-pci", "socket": socket, "bus": bus }).to_string(),
            )]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files;

    impl DeviceFiles for Files {
        fn model_socket(&self, index: usize) -> PathBuf {
            format!("/run/model{index}").into()
        }

        fn device_disk(&self, index: usize) -> PathBuf {
            format!("/run/a,b{index}").into()
        }
    }

    fn line(devices: &[&str]) -> String {
        let devices = devices.iter().map(|device| device.parse().unwrap());
        let hardware = devices.fold(Hardware::new(), Hardware::device);
        options(&hardware, &Files).into_iter().map(|(name, value)| format!("{name} {value}\n")).collect()
    }

    #[test]
    fn devices_are_known_by_their_names_and_sizes() {
        for (text, device) in [
            ("edu", Device::Edu),
            ("nvme", Device::Nvme),
            ("ati+edu", Device::AtiAndEdu),
            ("gpu", Device::Gpu(8 << 30)),
            ("gpu:256M", Device::Gpu(256 << 20)),
            ("ivshmem", Device::Ivshmem(4 << 30)),
            ("testdev:128G", Device::TestDevice(128 << 30)),
        ] {
            assert_eq!(text.parse::<Device>().unwrap(), device, "{text}");
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device, "{text}");
        }
    }

    #[test]
    fn what_no_device_can_be_is_refused_with_what_can() {
        for text in ["", "gpu:", "gpu:3G", "gpu:8", "gpu:0M", "edu:4G", "gpu:18446744073709551615G", "testdev:2048G"] {
            let error = text.parse::<Device>().unwrap_err().to_string();
            assert!(error.contains("gpu[:SIZE]"), "{text}: {error}");
        }
        let many = (0..9).fold(Hardware::new(), |hardware, _| hardware.device(Device::Edu));
        assert!(many.check().unwrap_err().to_string().contains('8'));
    }

    #[test]
    fn each_device_has_a_port_behind_the_iommu() {
        let line = line(&["edu", "testdev:64G", "gpu:8G"]);
        assert!(line.starts_with("-device intel-iommu,"), "{line}");
        for (port, device) in [(0, "edu,"), (1, "pci-testdev,membar=65536M,"), (2, "{\"bus\":\"port2\"")] {
            assert!(line.contains(&format!("pcie-root-port,id=port{port},")), "{line}");
            let found = line.lines().find(|line| line.contains(&format!("-device {device}"))).unwrap();
            assert!(found.contains(&format!("port{port}")), "{found}");
        }
        assert!(line.contains(r#""path":"/run/model2""#), "{line}");
    }

    #[test]
    fn two_functions_share_a_port_and_paths_are_quoted() {
        let line = line(&["ati+edu", "nvme"]);
        assert!(line.contains("ati-vga,bus=port0,addr=0.0,multifunction=on"), "{line}");
        assert!(line.contains("bus=port0,addr=0.1"), "{line}");
        assert!(line.contains("file=/run/a,,b1"), "{line}");
    }
}
