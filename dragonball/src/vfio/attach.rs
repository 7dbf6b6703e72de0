//! Giving an IOMMU group to the guest: all of its functions, in slots as on the host.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Weak};

use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::VfioError;
use super::device::{Candidate, Options, Services, VfioFunction};
use super::dma::Dma;
use super::host::kvm::KvmVfio;
use super::host::sysfs::{Address, Group, Sysfs};
use super::host::{HostDevice, Iommu, iommufd, type1};
use crate::config::VfioConfig;
use crate::memory::layout::Range;
use crate::pci::windows::{BarRequest, Windows};
use crate::virtio::device::GuestMemory;

/// The machine's side of its devices of the host.
pub(crate) struct Passthrough {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    services: Services,
    sysfs: Sysfs,
    /// A VM has one of these for its life.
    kvm: Option<Arc<KvmVfio>>,
    /// What the devices share, as long as there is one.
    session: Weak<Session>,
}

/// What the functions of a group become: for each slot its functions with their numbers, function 0 first.
pub(crate) type Slots = Vec<Vec<(u8, Arc<VfioFunction>)>>;

/// A group's devices, opened, with what they share.
type Opened = (Arc<Session>, Vec<Arc<dyn HostDevice>>);

impl Passthrough {
    /// A machine without devices of the host.
    pub(crate) fn new(vm: Arc<VmFd>, memory: GuestMemory, services: Services) -> Self {
        Self { vm, memory, services, sysfs: Sysfs::default(), kvm: None, session: Weak::new() }
    }

    /// Makes the group of a device into functions. All of the guest's RAM is the device's from here on.
    ///
    /// # Errors
    /// When the group cannot be given, or the windows have no room. Nothing is left then.
    pub(crate) fn attach(&mut self, config: &VfioConfig, windows: &mut Windows) -> Result<Slots, VfioError> {
        let group = self.sysfs.group(&config.path)?;
        group.require_viable()?;
        let (session, hosts) = self.open(&group)?;
        self.services.windows = windows.ranges();
        let addresses: Vec<Address> = group.functions.iter().map(|function| function.address).collect();
        let candidates = hosts.into_iter().map(Candidate::new).collect::<Result<Vec<_>, _>>()?;
        let requests: Vec<BarRequest> = candidates.iter().flat_map(Candidate::requests).collect();
        let places = windows.place(&requests)?;
        let made = self.functions(config, &addresses, candidates, &places, &session);
        made.inspect_err(|_| places.into_iter().for_each(|place| windows.free(place)))
    }

    fn functions(
        &self,
        config: &VfioConfig,
        addresses: &[Address],
        candidates: Vec<Candidate>,
        places: &[Range],
        session: &Arc<Session>,
    ) -> Result<Slots, VfioError> {
        let numbers = slots(addresses);
        let mut made: BTreeMap<usize, Vec<_>> = BTreeMap::new();
        let mut places = places;
        for (candidate, (slot, number)) in candidates.into_iter().zip(&numbers) {
            let (own, rest) = places.split_at(candidate.requests().len());
            places = rest;
            let options = Options {
                clique: config.clique,
                peers: config.peer_to_peer.then(|| Arc::clone(&session.dma)),
                multi_function: numbers.iter().filter(|(other, _)| other == slot).count() > 1,
                keeper: Some(Arc::clone(session) as _),
            };
            let function = VfioFunction::new(candidate, own, &self.services, &options)?;
            made.entry(*slot).or_default().push((*number, Arc::new(function)));
        }
        Ok(made.into_values().collect())
    }

    /// Opens all devices of a group, and gives them the guest's RAM if they are the first.
    fn open(&mut self, group: &Group) -> Result<Opened, VfioError> {
        let name = format!("IOMMU group {}", group.number);
        let refused = |source| VfioError::Host { device: name.clone(), action: "open its devices", source };
        if let Some(session) = self.session.upgrade() {
            let hosts = session.way.open(group).map_err(refused)?;
            return Ok((session, hosts));
        }
        let way = Way::choose(group, self.kvm()).map_err(refused)?;
        let hosts = way.open(group).map_err(refused)?;
        let dma = Dma::new(way.iommu()).map_err(refused)?;
        let session = Arc::new(Session { way, dma: Arc::new(dma), memory: Arc::clone(&self.memory) });
        session.map_ram()?;
        self.session = Arc::downgrade(&session);
        Ok((session, hosts))
    }

    fn kvm(&mut self) -> Option<Arc<KvmVfio>> {
        if self.kvm.is_none() {
            match KvmVfio::new(&self.vm) {
                Ok(kvm) => self.kvm = Some(Arc::new(kvm)),
                // Without it, devices that bypass the caches are the only ones that could suffer.
                Err(error) => tracing::warn!(%error, "KVM was built without VFIO: it does not learn of devices"),
            }
        }
        self.kvm.clone()
    }
}

/// Slot and function number of each function in the guest: functions of one device stay together where its function 0 is
/// among them, because a guest looks for the others only then. Every other one gets a slot of its own.
fn slots(addresses: &[Address]) -> Vec<(usize, u8)> {
    let is_first = |one: &Address, other: &Address| other.function == 0 && one.device() == other.device();
    let first = |one: &Address| addresses.iter().position(|other| is_first(one, other));
    let number = |(index, one): (usize, &Address)| match first(one) {
        Some(slot) => (slot, one.function),
        None => (index, 0),
    };
    addresses.iter().enumerate().map(number).collect()
}

/// How the host gives its devices.
enum Way {
    Type1(Arc<type1::Container>),
    Iommufd(Arc<iommufd::AddressSpace>),
}

impl Way {
    /// Takes the newer way where the host has it for all devices of the group.
    fn choose(group: &Group, kvm: Option<Arc<KvmVfio>>) -> io::Result<Self> {
        let has_file = group.functions.iter().all(|function| iommufd::device_file(&function.directory).is_some());
        Ok(if has_file && iommufd::is_usable() {
            Self::Iommufd(Arc::new(iommufd::AddressSpace::open(kvm)?))
        } else {
            Self::Type1(Arc::new(type1::Container::open(kvm)?))
        })
    }

    fn iommu(&self) -> Arc<dyn Iommu> {
        match self {
            Self::Type1(container) => Arc::clone(container) as _,
            Self::Iommufd(space) => Arc::clone(space) as _,
        }
    }

    fn open(&self, group: &Group) -> io::Result<Vec<Arc<dyn HostDevice>>> {
        match self {
            Self::Type1(container) => {
                let files = container.add(group.number)?;
                group.functions.iter().map(|function| files.device(&function.address.to_string())).collect()
            }
            Self::Iommufd(space) => {
                let missing = || io::Error::other("the kernel has made no device file for it");
                let open = |function: &super::host::sysfs::Function| {
                    let file = iommufd::device_file(&function.directory).ok_or_else(missing)?;
                    space.device(&file, &function.address.to_string())
                };
                group.functions.iter().map(open).collect()
            }
        }
    }
}

/// What all devices of the host of one machine share. With the last of them it goes, and the kernel unmaps everything.
struct Session {
    dma: Arc<Dma>,
    way: Way,
    memory: GuestMemory,
}

impl Session {
    fn map_ram(&self) -> Result<(), VfioError> {
        for region in self.memory.iter() {
            let range = Range { start: region.start_addr().0, length: region.len() };
            // SAFETY: this value keeps the region mapped, and RAM is the guest's: this process takes nothing in it for
            // granted.
            unsafe { self.dma.map(range, region.as_ptr() as u64)? };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(addresses: &[&str]) -> Vec<(usize, u8)> {
        slots(&addresses.iter().map(|address| address.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn functions_of_a_device_share_a_slot_when_its_first_function_is_among_them() {
        assert_eq!(numbers(&["01:00.0", "01:00.1", "02:00.0"]), [(0, 0), (0, 1), (2, 0)]);
        assert_eq!(numbers(&["01:00.1", "01:00.3"]), [(0, 0), (1, 0)]);
        assert_eq!(numbers(&["01:00.0", "01:01.1", "02:00.1"]), [(0, 0), (1, 0), (2, 0)]);
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        let vm = match crate::kvm::open().and_then(|kvm| crate::kvm::create_vm(&kvm)) {
            Ok(vm) => vm,
            Err(error) => panic!("a VM is needed: {error}"),
        };
        let kvm = Arc::new(crate::vfio::testing::FakeKvm::default());
        let services = crate::vfio::testing::services(&kvm, &[]);
        let memory = crate::memory::GuestRam::new(64 << 20).unwrap();
        let mut passthrough = Passthrough::new(vm, Arc::clone(memory.memory()), services);
        let config = VfioConfig { path: "/dev/vfio/4096".into(), clique: None, peer_to_peer: false };
        let mut windows = Windows::new(crate::memory::layout::PCI_32, None);
        let error = passthrough.attach(&config, &mut windows).err().unwrap().to_string();
        assert!(error.contains("/dev/vfio/4096") && error.contains("give"), "{error}");
    }
}
