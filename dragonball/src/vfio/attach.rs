//! Giving an IOMMU group to the guest: all of its functions, in one slot, because they come and go together.

use std::io;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;

use super::VfioError;
use super::device::{Candidate, Options, Services, VfioFunction};
use super::dma::Dma;
use super::host::kvm::KvmVfio;
use super::host::sysfs::{Address, Group, Sysfs};
use super::host::{HostDevice, Iommu, iommufd, type1};
use crate::config::VfioConfig;
use crate::memory::layout::Range;
use crate::memory::listener::{Attachment, DmaListeners};
use crate::pci::windows::{BarRequest, Windows};

/// The machine's side of its devices of the host.
pub(crate) struct Passthrough {
    vm: Arc<VmFd>,
    listeners: DmaListeners,
    sysfs: Sysfs,
    shared: Mutex<SharedState>,
}

#[derive(Default)]
struct SharedState {
    /// A VM has one of these for its life.
    kvm: Option<Arc<KvmVfio>>,
    /// What the devices share, as long as there is one.
    session: Weak<Session>,
}

/// A group whose devices are this machine's, before it has a place in the guest. Its drop may take long: the host resets
/// what is closed.
pub(crate) struct PreparedGroup {
    candidates: Vec<Candidate>,
    /// Their numbers in the group's slot.
    numbers: Vec<u8>,
    times: PrepareTimes,
}

/// How long it took to prepare a group.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PrepareTimes {
    /// Opening its devices.
    pub(crate) open: Duration,
    /// Filling guest memory and mapping it into the IOMMU, at the same time; nothing where other devices are there before.
    pub(crate) dma_map: Duration,
    /// Resetting the devices and mapping their memory.
    pub(crate) bar_map: Duration,
}

/// The functions of a group with their numbers in its slot.
pub(crate) type Functions = Vec<(u8, Arc<VfioFunction>)>;

impl Passthrough {
    /// A machine without devices of the host.
    pub(crate) fn new(vm: Arc<VmFd>, listeners: DmaListeners) -> Self {
        Self { vm, listeners, sysfs: Sysfs::default(), shared: Mutex::default() }
    }

    /// Opens and resets the devices of a group. All of the guest's RAM is theirs from here on. May take seconds.
    ///
    /// # Errors
    /// When the group cannot be given. Nothing is left then.
    pub(crate) fn prepare(&self, config: &VfioConfig) -> Result<PreparedGroup, VfioError> {
        let group = self.sysfs.group(&config.path)?;
        group.require_viable()?;
        let addresses: Vec<Address> = group.functions.iter().map(|function| function.address).collect();
        let count = addresses.len();
        let numbers = numbers(&addresses).ok_or(VfioError::TooManyFunctions { group: group.number, count })?;
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = shared.session.strong_count() == 0;
        let refused = AtomicBool::new(false);
        let (give, given) = mpsc::channel();
        let (session, candidates, times) = std::thread::scope(|scope| {
            // Opening and resetting devices is mostly waiting for them, which is time to fill memory and to map it.
            let map = || self.map(is_first, &refused, given);
            let mapping = Builder::new().name("dma-map".to_owned()).spawn_scoped(scope, map).map_err(no_thread)?;
            let opened = self.open(&mut shared, &group, config, give);
            refused.store(opened.is_err(), Ordering::Relaxed);
            let mapped = mapping.join().unwrap_or_else(|panic| resume_unwind(panic));
            let (session, candidates, times) = opened?;
            Ok::<_, VfioError>((session, candidates, PrepareTimes { dma_map: mapped?, ..times }))
        })?;
        shared.session = Arc::downgrade(&session);
        Ok(PreparedGroup { candidates, numbers, times })
    }

    /// Gives the guest's memory to the devices of the session that comes; fills it before, as long as they are not refused.
    /// Answers how long that took, where they are the first.
    fn map(&self, fill: bool, refused: &AtomicBool, session: Receiver<Arc<Session>>) -> Result<Duration, VfioError> {
        let start = Instant::now();
        if fill {
            self.listeners.fill(&|| !refused.load(Ordering::Relaxed));
        }
        // Where none comes, there are no devices.
        let Ok(session) = session.recv() else { return Ok(Duration::ZERO) };
        session.map(&self.listeners)?;
        Ok(if fill { start.elapsed() } else { Duration::ZERO })
    }

    /// Makes a group this machine's, gives away what its devices share, and opens and resets them.
    fn open(
        &self,
        shared: &mut SharedState,
        group: &Group,
        config: &VfioConfig,
        give: Sender<Arc<Session>>,
    ) -> Result<(Arc<Session>, Vec<Candidate>, PrepareTimes), VfioError> {
        let start = Instant::now();
        let (session, joined) = self.join(shared, group, config.peer_to_peer)?;
        // Who takes it is there until it has it.
        let _ = give.send(Arc::clone(&session));
        let hosts = joined.devices()?;
        let open = start.elapsed();
        let options = Options {
            clique: config.clique,
            peers: config.peer_to_peer.then(|| Arc::clone(&session.dma)),
            multi_function: hosts.len() > 1,
            keeper: Some(Arc::clone(&session) as _),
        };
        let candidates = hosts.into_iter().map(|host| Candidate::new(host, &options)).collect::<Result<_, _>>()?;
        let times = PrepareTimes { open, bar_map: start.elapsed() - open, ..PrepareTimes::default() };
        Ok((session, candidates, times))
    }

    /// Makes a group this machine's. Gives what its devices share, in which nothing is mapped if they are the first.
    fn join(&self, shared: &mut SharedState, group: &Group, peers: bool) -> Result<(Arc<Session>, Joined), VfioError> {
        let name = format!("IOMMU group {}", group.number);
        let refused = |source| VfioError::Host { device: name.clone(), action: "open its devices", source };
        if let Some(session) = shared.session.upgrade() {
            if peers && !session.way.maps_devices() {
                return Err(VfioError::NoPeers);
            }
            let joined = session.way.join(group).map_err(refused)?;
            return Ok((session, joined));
        }
        let way = Way::choose(group, shared.kvm(&self.vm), peers).map_err(refused)?;
        let joined = way.join(group).map_err(refused)?;
        let dma = Arc::new(Dma::new(way.iommu()).map_err(refused)?);
        Ok((Arc::new(Session { way, dma, attachment: OnceLock::new() }), joined))
    }
}

fn no_thread(source: io::Error) -> VfioError {
    VfioError::Host { device: "guest memory".to_owned(), action: "start a thread that maps it", source }
}

impl SharedState {
    fn kvm(&mut self, vm: &VmFd) -> Option<Arc<KvmVfio>> {
        if self.kvm.is_none() {
            match KvmVfio::new(vm) {
                Ok(kvm) => self.kvm = Some(Arc::new(kvm)),
                // Without it, devices that bypass the caches are the only ones that could suffer.
                Err(error) => tracing::warn!(%error, "KVM was built without VFIO: it does not learn of devices"),
            }
        }
        self.kvm.clone()
    }
}

impl PreparedGroup {
    /// How long it took.
    pub(crate) fn times(&self) -> PrepareTimes {
        self.times
    }

    /// Gives the functions their memory in the windows. Gives what that takes, too, to be given back when they have gone.
    /// Takes no time. The group is empty afterwards.
    ///
    /// # Errors
    /// When the windows have no room, and the group is as it was; or when there are no file descriptors left. Nothing is
    /// taken then.
    pub(crate) fn place(
        &mut self,
        windows: &mut Windows,
        services: &Services,
    ) -> Result<(Functions, Vec<Range>), VfioError> {
        let requests: Vec<BarRequest> = self.candidates.iter().flat_map(Candidate::requests).collect();
        let places = windows.place(&requests)?;
        match self.functions(&places, services) {
            Ok(functions) => Ok((functions, places)),
            Err(error) => {
                places.into_iter().for_each(|place| windows.free(place));
                Err(error)
            }
        }
    }

    fn functions(&mut self, places: &[Range], services: &Services) -> Result<Functions, VfioError> {
        let mut rest = places;
        let mut functions = Functions::new();
        for (candidate, number) in self.candidates.drain(..).zip(&self.numbers) {
            let (own, others) = rest.split_at(candidate.requests().len());
            rest = others;
            functions.push((*number, Arc::new(VfioFunction::new(candidate, own, services)?)));
        }
        Ok(functions)
    }
}

/// The number of each function of a group in the group's slot: those of one device keep theirs, because drivers find each
/// other by them; those of several are counted. Nothing when there are more than a slot has.
fn numbers(addresses: &[Address]) -> Option<Vec<u8>> {
    const MAX: usize = 8;
    let one_device = addresses.iter().all(|one| Some(one.device()) == addresses.first().map(|first| first.device()));
    if one_device && addresses.iter().any(|one| one.function == 0) {
        return Some(addresses.iter().map(|one| one.function).collect());
    }
    (addresses.len() <= MAX).then(|| (0..8).take(addresses.len()).collect())
}

/// How the host gives its devices.
enum Way {
    Type1(Arc<type1::Container>),
    Iommufd(Arc<iommufd::AddressSpace>),
}

impl Way {
    /// Takes the newer way where the host has it for all devices of the group, unless devices shall reach each other's
    /// memory, which only the older one maps.
    fn choose(group: &Group, kvm: Option<Arc<KvmVfio>>, peers: bool) -> io::Result<Self> {
        let has_file = group.functions.iter().all(|function| iommufd::device_file(&function.directory).is_some());
        Ok(if has_file && iommufd::is_usable() && !peers {
            Self::Iommufd(Arc::new(iommufd::AddressSpace::open(kvm)?))
        } else {
            Self::Type1(Arc::new(type1::Container::open(kvm)?))
        })
    }

    /// Whether it maps the memory of devices for other devices. iommufd maps RAM alone (`IOMMU_IOAS_MAP`).
    fn maps_devices(&self) -> bool {
        matches!(self, Self::Type1(_))
    }

    fn iommu(&self) -> Arc<dyn Iommu> {
        match self {
            Self::Type1(container) => Arc::clone(container) as _,
            Self::Iommufd(space) => Arc::clone(space) as _,
        }
    }

    /// Makes a group this machine's, as far as memory can be mapped for its devices.
    fn join(&self, group: &Group) -> io::Result<Joined> {
        let names = group.functions.iter().map(|function| function.address.to_string());
        match self {
            Self::Type1(container) => Ok(Joined::Type1(container.add(group.number)?, names.collect())),
            Self::Iommufd(space) => {
                let missing = || io::Error::other("the kernel has made no device file for it");
                let open = |(function, name): (&super::host::sysfs::Function, String)| {
                    let file = iommufd::device_file(&function.directory).ok_or_else(missing)?;
                    space.device(&file, &name)
                };
                group.functions.iter().zip(names).map(open).collect::<io::Result<_>>().map(Joined::Iommufd)
            }
        }
    }
}

/// A group that is this machine's.
enum Joined {
    /// Its devices, by their names, are yet to be opened.
    Type1(Arc<type1::Group>, Vec<String>),
    /// Its devices were opened, because nothing less tells which addresses the IOMMU translates for them.
    Iommufd(Vec<Arc<dyn HostDevice>>),
}

impl Joined {
    /// Its devices, open. The kernel resets them for that where it can, which takes a while.
    fn devices(self) -> Result<Vec<Arc<dyn HostDevice>>, VfioError> {
        let open = |group: &Arc<type1::Group>, name: String| {
            let refused = |source| VfioError::Host { device: name.clone(), action: "open it", source };
            group.device(&name).map_err(refused)
        };
        match self {
            Self::Type1(group, names) => names.into_iter().map(|name| open(&group, name)).collect(),
            Self::Iommufd(hosts) => Ok(hosts),
        }
    }
}

/// What all devices of the host of one machine share. With the last of them it goes, and the kernel unmaps everything.
struct Session {
    dma: Arc<Dma>,
    way: Way,
    /// Keeps memory from being discarded under the devices: dropped after what lets them at it.
    attachment: OnceLock<Attachment>,
}

impl Session {
    /// Gives devices the guest's memory, unless they have it.
    fn map(&self, listeners: &DmaListeners) -> Result<(), VfioError> {
        if self.attachment.get().is_none() {
            let attachment = self.dma.follow(listeners)?;
            // Nobody else has this session before it has its memory.
            let _ = self.attachment.set(attachment);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(addresses: &[&str]) -> Option<Vec<u8>> {
        numbers(&addresses.iter().map(|address| address.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn a_group_fills_one_slot_whose_first_function_is_there() {
        assert_eq!(of(&["01:00.0"]), Some(vec![0]));
        assert_eq!(of(&["01:00.0", "01:00.1", "01:00.3"]), Some(vec![0, 1, 3]));
        assert_eq!(of(&["01:00.1", "01:00.3"]), Some(vec![0, 1]));
        assert_eq!(of(&["01:00.0", "02:00.0", "02:00.1"]), Some(vec![0, 1, 2]));
        assert_eq!(of(&["01:00.0"; 9].map(|_| "01:00.1")), None);
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        let vm = crate::kvm::open().and_then(|kvm| crate::kvm::create_vm(&kvm)).unwrap();
        let memory = crate::memory::GuestRam::new(64 << 20).unwrap();
        let passthrough = Passthrough::new(vm, DmaListeners::new(Arc::clone(memory.memory())));
        let config = VfioConfig { path: "/dev/vfio/4096".into(), clique: None, peer_to_peer: false };
        let error = passthrough.prepare(&config).err().unwrap().to_string();
        assert!(error.contains("/dev/vfio/4096") && error.contains("give"), "{error}");
    }
}
