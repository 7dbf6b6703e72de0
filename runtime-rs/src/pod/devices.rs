//! The devices of the host that a sandbox's containers have.
//!
//! One that is known when the sandbox starts is in its machine from the start; one that comes with a later container is
//! plugged, and unplugged when that container goes. They belong to the machine's process: whatever becomes of it, the
//! kernel takes them back and leaves them bound to vfio-pci.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::agent::PciDevice;

use crate::error::{Error, chain};
use crate::host::blocking;
use crate::machine::Hardware;
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
    /// The container that has it.
    owner: Option<String>,
    /// On the guest's PCI bus; empty until it is there.
    address: String,
    /// It was in the machine from the start, and stays there.
    first: bool,
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
    pub async fn start(hardware: Arc<dyn Hardware>, first: &[PathBuf], deadline: Duration) -> Result<Self, Error> {
        let mut held = HashMap::new();
        if !first.is_empty() {
            let machine = Arc::clone(&hardware);
            let addresses = blocking::run("devices", move || machine.first_devices()).await??;
            let known = first.iter().cloned().zip(addresses);
            held.extend(known.map(|(path, address)| (path, Held { owner: None, address, first: true })));
        }
        Ok(Self { hardware, deadline, held: Mutex::new(held) })
    }

    /// Gives container `owner` these devices; those that the machine does not have are plugged.
    ///
    /// # Errors
    ///
    /// [`Error::State`] for a device that another container has, [`Error::Change`] for one that the guest does not get.
    /// Those before it stay the container's until they are given back.
    pub async fn take(&self, owner: &str, devices: &[Passed]) -> Result<Vec<PciDevice>, Error> {
        let mut taken = Vec::new();
        for device in devices {
            let address = match self.claim(owner, &device.path)? {
                Some(address) => address,
                None => self.plug(&device.path).await?,
            };
            taken.push(PciDevice {
                address,
                file_mode: device.file_mode,
                uid: device.uid,
                gid: device.gid,
                ..PciDevice::default()
            });
        }
        Ok(taken)
    }

    /// The address of a device that the machine has; nothing for one that is to be plugged.
    fn claim(&self, owner: &str, path: &Path) -> Result<Option<String>, Error> {
        let mut held = self.held();
        let Some(device) = held.get_mut(path) else {
            let device = Held { owner: Some(owner.to_owned()), address: String::new(), first: false };
            held.insert(path.to_owned(), device);
            return Ok(None);
        };
        if let Some(other) = &device.owner {
            let text = format!("device {} belongs to container {other}; delete that one first", path.display());
            return Err(Error::State(text));
        }
        device.owner = Some(owner.to_owned());
        Ok(Some(device.address.clone()))
    }

    async fn plug(&self, path: &Path) -> Result<String, Error> {
        let (hardware, deadline, plugged) = (Arc::clone(&self.hardware), self.deadline, path.to_owned());
        let added = blocking::run("plug", move || hardware.add_device(&plugged, deadline)).await;
        let mut held = self.held();
        match added.and_then(|added| added.map_err(Error::from)) {
            Ok(address) => {
                if let Some(device) = held.get_mut(path) {
                    device.address.clone_from(&address);
                }
                tracing::info!(device = %path.display(), address, "the guest has a device of the host");
                Ok(address)
            }
            Err(error) => {
                held.remove(path);
                Err(error)
            }
        }
    }

    /// Takes a container's devices from it, and those that came for it from the machine. One that the guest does not let
    /// go stays, for the next container that asks for it.
    pub async fn give_back(&self, owner: &str) {
        for path in self.disown(owner) {
            let (hardware, unplugged) = (Arc::clone(&self.hardware), path.clone());
            let removed = blocking::run("unplug", move || hardware.remove_device(&unplugged, REMOVE_DEADLINE)).await;
            match removed.and_then(|removed| removed.map_err(Error::from)) {
                Ok(()) => drop(self.held().remove(&path)),
                Err(error) => {
                    tracing::warn!(device = %path.display(), error = %chain(&error), "a device stays in the guest");
                    self.free(&path);
                }
            }
        }
    }

    /// Frees those that stay, and answers those that are to go; they are the container's until they have.
    fn disown(&self, owner: &str) -> Vec<PathBuf> {
        let mut leaving = Vec::new();
        for (path, device) in self.held().iter_mut().filter(|(_, device)| device.owner.as_deref() == Some(owner)) {
            if device.first {
                device.owner = None;
            } else {
                leaving.push(path.clone());
            }
        }
        leaving
    }

    fn free(&self, path: &Path) {
        if let Some(device) = self.held().get_mut(path) {
            device.owner = None;
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<PathBuf, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this host has devices that a container could ask for: where it has none, no machine is made to take any.
#[must_use]
pub fn may_be_asked_for() -> bool {
    let files = |directory: &str| std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_group = |name: std::ffi::OsString| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok());
    files("/dev/vfio").any(|file| is_group(file.file_name())) || files("/dev/vfio/devices").next().is_some()
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

        fn add_device(&self, path: &Path, deadline: Duration) -> Result<String, ChangeError> {
            self.log(format!("add {}", path.display()));
            if path.ends_with("refused") { Err(ChangeError::Unseen(deadline)) } else { Ok("0000:00:07.0".to_owned()) }
        }

        fn remove_device(&self, path: &Path, deadline: Duration) -> Result<(), ChangeError> {
            self.log(format!("remove {}", path.display()));
            if *self.in_use.lock().unwrap() { Err(ChangeError::InUse(deadline)) } else { Ok(()) }
        }

        fn add_card(&self, _: &str, _: &dragonball::NetConfig, _: Duration) -> Result<(), ChangeError> {
            Err(ChangeError::NotPluggable)
        }

        fn remove_card(&self, name: &str, _: Duration) -> Result<(), ChangeError> {
            Err(ChangeError::NotFound(name.to_owned()))
        }

        fn first_devices(&self) -> Result<Vec<String>, ChangeError> {
            Ok(vec!["0000:00:05.0".to_owned()])
        }
    }

    async fn devices(first: &[&str]) -> (Arc<Fake>, Devices) {
        let fake = Arc::new(Fake::default());
        let first: Vec<PathBuf> = first.iter().map(PathBuf::from).collect();
        let hardware = Arc::clone(&fake) as Arc<dyn Hardware>;
        (fake, Devices::start(hardware, &first, Duration::from_secs(1)).await.unwrap())
    }

    fn passed(path: &str) -> Passed {
        Passed { path: PathBuf::from(path), file_mode: Some(0o600), uid: None, gid: None }
    }

    async fn addresses(devices: &Devices, owner: &str, paths: &[&str]) -> Result<Vec<String>, Error> {
        let passed: Vec<Passed> = paths.iter().map(|path| passed(path)).collect();
        Ok(devices.take(owner, &passed).await?.into_iter().map(|device| device.address).collect())
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
}
