//! Changing a machine while it runs: devices and vCPUs come and go, and what it consists of can be read.
//!
//! A change is a transaction. A device is built, put into a slot and announced to the guest; the change is done when a
//! driver of the guest has taken it. Whatever fails on the way is undone backwards, and the error says which step it
//! was. A device is removed when the guest has let it go; a guest that does not is told no longer to, and the device
//! stays usable.

mod memory_types;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

pub use self::memory_types::{MemoryTypesInfo, TypedRange};

use crate::config::{ConfigError, DeviceConfig};
use crate::control::{Control, Request};
use crate::host;
use crate::machine::PreparedDevice;
use crate::vcpu::mtrr::VcpuMemoryTypes;
use crate::vfio::Passthrough;
use crate::vm::{ExitReason, Shared};

/// How long a guest gets to take a device or to let one go, where nothing else is asked for.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// Why a machine did not change as asked.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The machine was started without hot-plug.
    #[error("The machine was started without hot-plug: start it with `hot_plug` (a control socket sets it)")]
    NotPluggable,
    /// The device's configuration was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device could not be made.
    #[error("The {device} device cannot be made")]
    Device {
        /// Which one.
        device: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The name is taken, too long, or empty.
    #[error("The name {0:?} cannot be used: give one of 1 to 64 bytes that no other device has")]
    Name(String),
    /// All slots are taken.
    #[error("All {} slots of the machine are taken: remove a device first", crate::config::DEVICES_MAX)]
    NoSlot,
    /// No device of that name.
    #[error("There is no device named {0:?}: see the machine's information for the names")]
    NotFound(String),
    /// The device is one that the machine cannot do without while it runs.
    #[error("The device {0:?} cannot be removed while the machine runs")]
    Fixed(String),
    /// Another change of the same thing is under way.
    #[error("{0} is being changed: try again when that has ended")]
    Busy(String),
    /// The guest did not look at the announcement.
    #[error(
        "The guest did not look at the new device within {0:?}: is its kernel hung, or without ACPI hot-plug? The device was taken back"
    )]
    Unseen(Duration),
    /// The guest saw the device, but no driver took it.
    #[error(
        "The guest saw the new device but no driver took it within {0:?}: load its driver. The guest is asked to let the device go"
    )]
    NoDriver(Duration),
    /// The guest let a new device go instead of taking it.
    #[error("The guest let the new device go before a driver took it")]
    Declined,
    /// The guest did not let a device go.
    #[error(
        "The guest did not let the device go within {0:?}; it stays usable: end what uses it in the guest, and try again"
    )]
    InUse(Duration),
    /// More or fewer vCPUs than the machine can have.
    #[error("{given} vCPUs are out of range: give 1 to {max} (the machine was started with that maximum)")]
    Vcpus {
        /// What was asked for.
        given: u8,
        /// The most of this machine.
        max: u8,
    },
    /// Less memory than the machine was started with, or more than it may have.
    #[error(
        "{given} bytes of memory are out of range: give {min} to {max} bytes (the machine was started with these limits)"
    )]
    Memory {
        /// What was asked for, in bytes.
        given: u64,
        /// What the machine was started with, in bytes.
        min: u64,
        /// The most of this machine, in bytes.
        max: u64,
    },
    /// The machine has no balloon.
    #[error("The machine has no balloon: start it with one")]
    NoBalloon,
    /// The host refused something.
    #[error("The host refused to {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The machine has ended, or ended before the change was done.
    #[error("The machine has ended")]
    Ended,
}

/// How many vCPUs a machine has after a change.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct VcpuCount {
    /// What was asked for.
    pub asked: u8,
    /// How many the machine has and the guest knows of. To be used, a new one must be brought online in the guest.
    pub present: u8,
    /// The most that it can have.
    pub max: u8,
}

/// How much memory a machine has after a change, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct MemorySize {
    /// What it was started with.
    pub boot: u64,
    /// What was asked for.
    pub asked: u64,
    /// What the guest has.
    pub present: u64,
    /// The most that it can have.
    pub max: u64,
}

/// How the balloon is, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct BalloonSize {
    /// What the guest shall give back.
    pub target: u64,
    /// What it says that it has given back.
    pub actual: u64,
    /// What went back to the host in the machine's life, free pages that the guest reported included.
    pub discarded: u64,
    /// Memory that the guest had free and available when it last told.
    pub available: Option<u64>,
}

/// Whether the guest has a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// It is in its slot; the guest's driver works on it or may do so.
    Present,
    /// It was announced, and no driver has taken it yet.
    Announced,
    /// The guest is asked to let it go.
    Leaving,
}

/// A range of guest-physical addresses.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct RangeInfo {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// What is there.
    pub what: String,
}

/// A device of a machine.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct DeviceInfo {
    /// Its name, unique in the machine.
    pub name: String,
    /// What it is: `blk`, `fs`, `pmem` …
    pub kind: String,
    /// Its address on the guest's PCI bus, for instance `0000:00:05.0`.
    pub address: String,
    /// Its slot.
    pub slot: u8,
    /// Whether the guest has it.
    pub presence: Presence,
    /// Its memory: base address registers as the guest has set them, and memory shown to the guest directly.
    pub ranges: Vec<RangeInfo>,
    /// The interrupt routes it uses.
    pub interrupts: Vec<u32>,
    /// How long it took to come, for a device of the host that was added to the running machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<AttachTimes>,
}

/// How long the steps took in which a device of the host came to a running machine, each in microseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct AttachTimes {
    /// Opening its group and the devices in it.
    pub open: u64,
    /// Filling all guest memory and mapping it into the IOMMU, which goes on while devices are opened and reset; 0 where
    /// another device of the host was there before.
    pub dma_map: u64,
    /// Resetting its devices and mapping their memory.
    pub bar_map: u64,
    /// From the announcement until the guest touched it.
    pub announce: u64,
    /// From then on until the guest had set it up, with a driver if it has one.
    pub driver: u64,
}

/// What a machine consists of now.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct MachineInfo {
    /// Its vCPUs; `asked` is the last target.
    pub vcpus: VcpuCount,
    /// Its memory.
    pub memory: MemorySize,
    /// Its balloon, if it has one.
    pub balloon: Option<BalloonSize>,
    /// Whether devices and vCPUs can come and go.
    pub hot_plug: bool,
    /// The guest-physical map: RAM, windows, registers.
    pub map: Vec<RangeInfo>,
    /// The devices by their slots.
    pub devices: Vec<DeviceInfo>,
}

/// Takes the outcome of a change. Dropping it unanswered says that the machine has ended.
pub(crate) struct Reply<T>(Option<Answer<T>>);

type Answer<T> = Box<dyn FnOnce(Result<T, ChangeError>) + Send>;

impl<T> Reply<T> {
    pub(crate) fn new(answer: impl FnOnce(Result<T, ChangeError>) + Send + 'static) -> Self {
        Self(Some(Box::new(answer)))
    }

    pub(crate) fn send(mut self, result: Result<T, ChangeError>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            answer(Err(ChangeError::Ended));
        }
    }
}

/// What can be changed.
pub(crate) enum Change {
    /// Put this device into a slot.
    Add {
        /// Its name; chosen by the machine where none is given.
        name: Option<String>,
        /// The device, ready to work.
        device: PreparedDevice,
        /// How long the guest gets.
        deadline: Duration,
        /// Who wants to know.
        reply: Reply<DeviceInfo>,
    },
    /// Take a device away.
    Remove {
        /// Its name.
        name: String,
        /// How long the guest gets.
        deadline: Duration,
        /// Who wants to know.
        reply: Reply<()>,
    },
    /// Have this many vCPUs.
    Vcpus {
        /// How many.
        count: u8,
        /// How long the guest gets.
        deadline: Duration,
        /// Who wants to know.
        reply: Reply<VcpuCount>,
    },
    /// Press the power button.
    PowerButton(Reply<()>),
    /// Let the vCPUs stand still, or run again.
    Pause {
        /// Whether they shall stand still.
        paused: bool,
        /// Who wants to know.
        reply: Reply<()>,
    },
    /// Say what there is.
    Info(Reply<MachineInfo>),
    /// Say which memory types each vCPU has.
    MemoryTypes(Reply<BTreeMap<u8, VcpuMemoryTypes>>),
}

/// Changes a running machine; cheap to clone. Its calls wait until the change is done or has failed.
#[derive(Clone)]
pub struct Manager {
    control: Control,
    shared: Arc<Shared>,
    /// Gone with the machine, whose memory it holds.
    passthrough: Weak<Passthrough>,
}

impl Manager {
    pub(crate) fn new(control: Control, shared: Arc<Shared>, passthrough: Weak<Passthrough>) -> Self {
        Self { control, shared, passthrough }
    }

    /// Ends the machine.
    pub(crate) fn end(&self, reason: ExitReason) {
        self.control.send(Request::End(reason));
    }

    fn change(&self, change: Change) {
        self.control.send(Request::Change(change));
    }

    fn wait<T: Send + 'static>(&self, request: impl FnOnce(Reply<T>) -> Change) -> Result<T, ChangeError> {
        let (sender, answer) = mpsc::channel();
        self.change(request(Reply::new(move |result| {
            // Nobody listens any more when the waiting thread is gone.
            let _ = sender.send(result);
        })));
        answer.recv().unwrap_or(Err(ChangeError::Ended))
    }

    /// Adds a device: it is in use by a driver of the guest when this returns.
    ///
    /// # Errors
    /// [`ChangeError`]; the device is not there then, or is on its way out.
    pub fn add_device(
        &self,
        name: Option<String>,
        config: &DeviceConfig,
        deadline: Duration,
    ) -> Result<DeviceInfo, ChangeError> {
        config.validate()?;
        let passthrough = self.passthrough.upgrade().ok_or(ChangeError::Ended)?;
        let device = PreparedDevice::open(config, &passthrough)?;
        drop(passthrough);
        self.wait(|reply| Change::Add { name, device, deadline, reply })
    }

    /// Removes the device of this name: the guest has let it go when this returns.
    ///
    /// # Errors
    /// [`ChangeError`]; the device stays usable then.
    pub fn remove_device(&self, name: &str, deadline: Duration) -> Result<(), ChangeError> {
        self.wait(|reply| Change::Remove { name: name.to_owned(), deadline, reply })
    }

    /// Adds or removes vCPUs until there are `count`, and says how many there are: fewer or more than asked for when the
    /// guest did not follow within the deadline.
    ///
    /// # Errors
    /// [`ChangeError::Vcpus`], [`ChangeError::NotPluggable`], [`ChangeError::Busy`] and [`ChangeError::Ended`].
    pub fn resize_vcpus(&self, count: u8, deadline: Duration) -> Result<VcpuCount, ChangeError> {
        self.wait(|reply| Change::Vcpus { count, deadline, reply })
    }

    /// Gives the guest memory or takes some until it has `bytes`, and says how much it has: less or more than asked for
    /// when it did not follow within the deadline, or could not give back what it uses.
    ///
    /// # Errors
    /// [`ChangeError::Memory`], [`ChangeError::Host`] and [`ChangeError::Ended`].
    pub fn resize_memory(&self, bytes: u64, deadline: Duration) -> Result<MemorySize, ChangeError> {
        let size = self.shared.memory_size();
        if bytes < size.boot || bytes > size.max {
            return Err(ChangeError::Memory { given: bytes, min: size.boot, max: size.max });
        }
        if let Some(memory) = self.shared.memory() {
            let refused = |source| ChangeError::Host { action: "tell the guest of its memory", source };
            let wanted = memory.set_requested(bytes - size.boot).map_err(refused)?;
            let _as_told_below = memory.wait(Instant::now() + deadline, |state| state.plugged == wanted);
        }
        self.unless_ended(self.shared.memory_size())
    }

    /// Asks the guest to give `bytes` of its memory back by its balloon, and says how much it gave: less than asked for
    /// when it did not follow within the deadline, or has nothing to spare.
    ///
    /// # Errors
    /// [`ChangeError::NoBalloon`], [`ChangeError::Host`] and [`ChangeError::Ended`].
    pub fn set_balloon(&self, bytes: u64, deadline: Duration) -> Result<BalloonSize, ChangeError> {
        let balloon = self.shared.balloon().ok_or(ChangeError::NoBalloon)?;
        let refused = |source| ChangeError::Host { action: "tell the guest of its balloon", source };
        let target = balloon.set_target(bytes).map_err(refused)?;
        let _as_told_below = balloon.wait(Instant::now() + deadline, |state| state.actual == target);
        let size = self.shared.balloon_size().ok_or(ChangeError::NoBalloon)?;
        self.unless_ended(size)
    }

    fn unless_ended<T>(&self, answer: T) -> Result<T, ChangeError> {
        if self.shared.has_ended() { Err(ChangeError::Ended) } else { Ok(answer) }
    }

    /// Presses the machine's power button; what that does is the guest's choice.
    ///
    /// # Errors
    /// [`ChangeError::NotPluggable`] and [`ChangeError::Ended`].
    pub fn press_power_button(&self) -> Result<(), ChangeError> {
        self.wait(Change::PowerButton)
    }

    /// Lets all vCPUs stand still: they do when this returns.
    ///
    /// # Errors
    /// [`ChangeError::Ended`].
    pub fn pause(&self) -> Result<(), ChangeError> {
        self.wait(|reply| Change::Pause { paused: true, reply })
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// [`ChangeError::Ended`].
    pub fn resume(&self) -> Result<(), ChangeError> {
        self.wait(|reply| Change::Pause { paused: false, reply })
    }

    /// What the machine consists of now.
    ///
    /// # Errors
    /// [`ChangeError::Ended`].
    pub fn info(&self) -> Result<MachineInfo, ChangeError> {
        self.wait(Change::Info)
    }

    /// Which memory types the vCPUs give to the machine's ranges by their MTRRs. Each vCPU leaves the guest for that.
    ///
    /// # Errors
    /// [`ChangeError::Busy`], [`ChangeError::Host`] and [`ChangeError::Ended`].
    pub fn memory_types(&self) -> Result<MemoryTypesInfo, ChangeError> {
        let vcpus = self.wait(Change::MemoryTypes)?;
        Ok(MemoryTypesInfo::of(vcpus, &self.info()?, host::address_bits()))
    }
}
