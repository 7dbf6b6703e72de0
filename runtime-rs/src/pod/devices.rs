//! The devices of the host that a sandbox's containers have.
//!
//! One that is known when the sandbox starts is in its machine from the start; one that comes with a later container is
//! plugged, and unplugged when the last container that has it goes. They belong to the machine's process: whatever becomes
//! of it, the kernel takes them back, PCI functions still bound to vfio-pci.
//!
//! Functions belong to one container at a time. A disk may belong to several: they share the guest's one device, so that
//! what one writes the others read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::agent::PciDevice;
use tokio::sync::OnceCell;

use crate::error::{Error, chain};
use crate::host::blocking;
use crate::machine::{FirstDevices, Hardware, HostDevice, Plugged};
use crate::spec::Passed;

/// How long the guest gets to let a device go.
const REMOVE_DEADLINE: Duration = Duration::from_secs(10);

/// What of a sandbox's machine is the host's.
pub struct Devices {
    hardware: Arc<dyn Hardware>,
    deadline: Duration,
    held: Mutex<HashMap<PathBuf, Held>>,
}

/// A device in the machine, or on its way there.
#[derive(Debug)]
struct Held {
    device: HostDevice,
    /// The containers that have it.
    owners: Vec<String>,
    /// Set once the guest has it; the first who wants to know plugs it.
    place: Arc<OnceCell<Plugged>>,
    /// It was in the machine from the start, and stays there.
    first: bool,
    /// It is being unplugged.
    leaving: bool,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").field("held", &self.held()).finish_non_exhaustive()
    }
}

impl Devices {
    /// Of a machine that was started with `first`.
    ///
    /// # Errors
    ///
    /// [`Error::Change`] when the machine has ended meanwhile.
    pub async fn start(hardware: Arc<dyn Hardware>, first: &[HostDevice], deadline: Duration) -> Result<Self, Error> {
        let mut held = HashMap::new();
        if !first.is_empty() {
            let machine = Arc::clone(&hardware);
            let FirstDevices { groups, disks } = blocking::run("devices", move || machine.first_devices()).await??;
            let (mut groups, mut disks) = (groups.into_iter(), disks.into_iter());
            for device in first {
                let address = match device {
                    HostDevice::Group(_) => groups.next(),
                    HostDevice::Disk { .. } => disks.next(),
                };
                // Its name is of no use: it stays.
                let place = address.map(|address| Plugged { name: String::new(), address });
                let held_first = Held::new(device, OnceCell::new_with(place), true);
                held.insert(device.path().to_owned(), held_first);
            }
        }
        Ok(Self { hardware, deadline, held: Mutex::new(held) })
    }

    /// Gives container `owner` these devices; those that the machine does not have are plugged.
    ///
    /// # Errors
    ///
    /// As [`Self::take`]. Those before it stay the container's until they are given back.
    pub async fn take_all(&self, owner: &str, devices: &[Passed]) -> Result<Vec<PciDevice>, Error> {
        let mut taken = Vec::new();
        for passed in devices {
            taken.push(PciDevice {
                address: self.take(owner, &passed.device).await?,
                file_mode: passed.file_mode,
                uid: passed.uid,
                gid: passed.gid,
                node: passed.node.clone(),
                read_only: passed.is_read_only(),
                ..PciDevice::default()
            });
        }
        Ok(taken)
    }

    /// Gives container `owner` this device, and answers its address on the guest's PCI bus.
    ///
    /// # Errors
    ///
    /// [`Error::State`] for a device that another container has and cannot be shared, [`Error::Change`] for one that the
    /// guest does not get.
    pub async fn take(&self, owner: &str, device: &HostDevice) -> Result<String, Error> {
        let place = self.claim(owner, device)?;
        let plugged = place.get_or_try_init(|| self.plug(device)).await;
        match plugged {
            Ok(plugged) => Ok(plugged.address.clone()),
            Err(error) => {
                self.forget(owner, device.path());
                Err(error)
            }
        }
    }

    /// Makes `owner` one of a device's owners, and answers where it is, or will be.
    fn claim(&self, owner: &str, device: &HostDevice) -> Result<Arc<OnceCell<Plugged>>, Error> {
        let mut held = self.held();
        let entry = held.entry(device.path().to_owned());
        let entry = entry.or_insert_with(|| Held::new(device, OnceCell::new(), false));
        if let Some(problem) = entry.problem(device) {
            return Err(Error::State(format!("device {} {problem}", device.path().display())));
        }
        if !entry.owners.iter().any(|other| other == owner) {
            entry.owners.push(owner.to_owned());
        }
        Ok(Arc::clone(&entry.place))
    }

    async fn plug(&self, device: &HostDevice) -> Result<Plugged, Error> {
        let (hardware, deadline, added) = (Arc::clone(&self.hardware), self.deadline, device.clone());
        let plugged = blocking::run("plug", move || hardware.add_device(&added, deadline)).await??;
        tracing::info!(device = %device.path().display(), plugged.address, "the guest has a device of the host");
        Ok(plugged)
    }

    /// Takes a device that could not be plugged from a container.
    fn forget(&self, owner: &str, path: &Path) {
        let mut held = self.held();
        if let Some(device) = held.get_mut(path) {
            device.owners.retain(|other| other != owner);
            if device.owners.is_empty() {
                held.remove(path);
            }
        }
    }

    /// Takes a container's devices from it, and those that came for it and are nobody else's from the machine. One that the
    /// guest does not let go stays, for the next container that asks for it.
    pub async fn give_back(&self, owner: &str) {
        for (path, name) in self.disown(owner) {
            let hardware = Arc::clone(&self.hardware);
            let removed = blocking::run("unplug", move || hardware.remove_device(&name, REMOVE_DEADLINE)).await;
            match removed.and_then(|removed| removed.map_err(Error::from)) {
                Ok(()) => drop(self.held().remove(&path)),
                Err(error) => {
                    tracing::warn!(device = %path.display(), error = %chain(&error), "a device stays in the guest");
                    if let Some(device) = self.held().get_mut(&path) {
                        device.leaving = false;
                    }
                }
            }
        }
    }

    /// Frees those that stay, and answers those that are to go, with what the machine calls them.
    fn disown(&self, owner: &str) -> Vec<(PathBuf, String)> {
        let mut leaving = Vec::new();
        for (path, device) in self.held().iter_mut() {
            let before = device.owners.len();
            device.owners.retain(|other| other != owner);
            let was_the_last = device.owners.len() < before && device.owners.is_empty();
            if let (true, false, Some(plugged)) = (was_the_last, device.first, device.place.get()) {
                device.leaving = true;
                leaving.push((path.clone(), plugged.name.clone()));
            }
        }
        leaving
    }

    fn held(&self) -> MutexGuard<'_, HashMap<PathBuf, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn new(device: &HostDevice, place: OnceCell<Plugged>, first: bool) -> Self {
        let (device, place) = (device.clone(), Arc::new(place));
        Self { device, owners: Vec::new(), place, first, leaving: false }
    }

    /// Why a container cannot have it as `wanted`.
    fn problem(&self, wanted: &HostDevice) -> Option<String> {
        if self.leaving {
            return Some("is being taken from the guest; try again".to_owned());
        }
        match (&self.device, wanted, self.owners.first()) {
            (HostDevice::Group(_), _, Some(other)) => {
                Some(format!("belongs to container {other}; delete that one first"))
            }
            (HostDevice::Disk { read_only: true, .. }, HostDevice::Disk { read_only: false, .. }, _) => Some(
                "is in the guest for reading only; give it for writing to the container that is made first".to_owned(),
            ),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::ChangeError;

    /// Hardware that notes what is done to it, and does not let go of devices that are in use.
    #[derive(Default)]
    struct Fake {
        log: Mutex<Vec<String>>,
        in_use: Mutex<bool>,
    }

    impl Fake {
        fn log(&self, line: String) {
            self.log.lock().unwrap().push(line);
        }

        fn take_log(&self) -> Vec<String> {
            std::mem::take(&mut self.log.lock().unwrap())
        }
    }

    impl Hardware for Fake {
        fn resize_vcpus(&self, count: u8, _: Duration) -> Result<u8, ChangeError> {
            Ok(count)
        }

        fn resize_memory(&self, bytes: u64, _: Duration) -> Result<u64, ChangeError> {
            Ok(bytes)
        }

        fn add_device(&self, device: &HostDevice, deadline: Duration) -> Result<Plugged, ChangeError> {
            let name = device.path().display().to_string();
            self.log(format!("add {name}"));
            if name.ends_with("refused") {
                return Err(ChangeError::Unseen(deadline));
            }
            Ok(Plugged { name, address: "0000:00:07.0".to_owned() })
        }

        fn remove_device(&self, name: &str, deadline: Duration) -> Result<(), ChangeError> {
            self.log(format!("remove {name}"));
            if *self.in_use.lock().unwrap() { Err(ChangeError::InUse(deadline)) } else { Ok(()) }
        }

        fn add_card(&self, _: &str, _: &dragonball::NetConfig, _: Duration) -> Result<(), ChangeError> {
            Err(ChangeError::NotPluggable)
        }

        fn remove_card(&self, name: &str, _: Duration) -> Result<(), ChangeError> {
            Err(ChangeError::NotFound(name.to_owned()))
        }

        fn first_devices(&self) -> Result<FirstDevices, ChangeError> {
            Ok(FirstDevices { groups: vec!["0000:00:05.0".to_owned()], disks: vec!["0000:00:04.0".to_owned()] })
        }
    }

    async fn devices(first: &[&str]) -> (Arc<Fake>, Devices) {
        let fake = Arc::new(Fake::default());
        let first: Vec<HostDevice> = first.iter().map(|path| device(path, true)).collect();
        let hardware = Arc::clone(&fake) as Arc<dyn Hardware>;
        (fake, Devices::start(hardware, &first, Duration::from_secs(1)).await.unwrap())
    }

    /// A group, or a disk by its name.
    fn device(path: &str, read_only: bool) -> HostDevice {
        let path = PathBuf::from(path);
        if path.starts_with("/dev/vfio") { HostDevice::Group(path) } else { HostDevice::Disk { path, read_only } }
    }

    async fn addresses(devices: &Devices, owner: &str, paths: &[&str]) -> Result<Vec<String>, Error> {
        let node = String::new();
        let passed = |path: &&str| Passed {
            device: device(path, true),
            file_mode: None,
            uid: None,
            gid: None,
            node: node.clone(),
        };
        let passed: Vec<Passed> = paths.iter().map(passed).collect();
        Ok(devices.take_all(owner, &passed).await?.into_iter().map(|device| device.address).collect())
    }

    #[tokio::test]
    async fn a_device_of_the_first_moment_is_given_from_one_container_to_the_next_and_stays() {
        let (fake, devices) = devices(&["/dev/vfio/1"]).await;
        assert_eq!(addresses(&devices, "a", &["/dev/vfio/1"]).await.unwrap(), ["0000:00:05.0"]);
        let text = addresses(&devices, "b", &["/dev/vfio/1"]).await.unwrap_err().to_string();
        assert!(text.contains("/dev/vfio/1 belongs to container a"), "{text}");
        devices.give_back("a").await;
        assert_eq!(addresses(&devices, "b", &["/dev/vfio/1"]).await.unwrap(), ["0000:00:05.0"]);
        assert!(fake.take_log().is_empty());
    }

    #[tokio::test]
    async fn a_device_that_comes_with_a_container_goes_with_it() {
        let (fake, devices) = devices(&[]).await;
        assert_eq!(addresses(&devices, "a", &["/dev/vfio/2", "/dev/vfio/3"]).await.unwrap().len(), 2);
        devices.give_back("b").await;
        assert_eq!(fake.take_log(), ["add /dev/vfio/2", "add /dev/vfio/3"]);
        devices.give_back("a").await;
        let mut log = fake.take_log();
        log.sort();
        assert_eq!(log, ["remove /dev/vfio/2", "remove /dev/vfio/3"]);
        addresses(&devices, "b", &["/dev/vfio/2"]).await.unwrap();
        assert_eq!(fake.take_log(), ["add /dev/vfio/2"]);
    }

    #[tokio::test]
    async fn what_was_plugged_before_a_refused_device_goes_when_it_is_given_back() {
        let (fake, devices) = devices(&[]).await;
        let error = addresses(&devices, "a", &["/dev/vfio/2", "/dev/refused"]).await.unwrap_err();
        assert!(matches!(error, Error::Change(ChangeError::Unseen(_))), "{error}");
        devices.give_back("a").await;
        assert_eq!(fake.take_log(), ["add /dev/vfio/2", "add /dev/refused", "remove /dev/vfio/2"]);
    }

    #[tokio::test]
    async fn a_device_that_the_guest_does_not_let_go_is_there_for_the_next_container() {
        let (fake, devices) = devices(&[]).await;
        addresses(&devices, "a", &["/dev/vfio/2"]).await.unwrap();
        *fake.in_use.lock().unwrap() = true;
        devices.give_back("a").await;
        *fake.in_use.lock().unwrap() = false;
        fake.take_log();
        assert_eq!(addresses(&devices, "b", &["/dev/vfio/2"]).await.unwrap(), ["0000:00:07.0"]);
        assert!(fake.take_log().is_empty());
        devices.give_back("b").await;
        assert_eq!(fake.take_log(), ["remove /dev/vfio/2"]);
    }

    #[tokio::test]
    async fn a_disk_is_shared_and_goes_with_the_last_of_its_containers() {
        let (fake, devices) = devices(&[]).await;
        let (writable, readable) = (device("/dev/sdb", false), device("/dev/sdb", true));
        let both = tokio::join!(devices.take("a", &writable), devices.take("b", &readable));
        assert_eq!((both.0.unwrap(), both.1.unwrap()), ("0000:00:07.0".to_owned(), "0000:00:07.0".to_owned()));
        devices.give_back("a").await;
        assert_eq!(fake.take_log(), ["add /dev/sdb"]);
        devices.give_back("b").await;
        assert_eq!(fake.take_log(), ["remove /dev/sdb"]);
    }

    #[tokio::test]
    async fn a_disk_that_is_there_for_reading_is_not_given_for_writing() {
        let (fake, devices) = devices(&["/dev/vfio/1", "/dev/sda"]).await;
        assert_eq!(devices.take("a", &device("/dev/sda", true)).await.unwrap(), "0000:00:04.0");
        let text = devices.take("b", &device("/dev/sda", false)).await.unwrap_err().to_string();
        assert!(text.contains("/dev/sda is in the guest for reading only"), "{text}");
        devices.give_back("b").await;
        devices.give_back("a").await;
        assert!(fake.take_log().is_empty());
    }
}
