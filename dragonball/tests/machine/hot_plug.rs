//! Devices and vCPUs that come and go, as small guests see them that do by hand what ACPI code would do.

#![expect(clippy::unwrap_used, reason = "a helper of tests, which fail by panics")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use dragonball::manage::{ChangeError, Manager, Presence};
use dragonball::{DeviceConfig, DiskConfig, ExitReason, MachineConfig, Vm, start};

use crate::guest::{Code, kvm, machine, wait_for_end};

const EVENTS: u32 = 0xc000_1000;
const PCI_UP: u32 = EVENTS + 0x10;
const PCI_DOWN: u32 = EVENTS + 0x14;
const PCI_EJECT: u32 = EVENTS + 0x18;
const CPU_SELECT: u32 = EVENTS + 0x20;
const CPU_EVENT: u32 = EVENTS + 0x28;
const CPU_EJECT: u32 = EVENTS + 0x2c;
const CPU_OST_EVENT: u32 = EVENTS + 0x30;
const CPU_OST_STATUS: u32 = EVENTS + 0x34;

/// Slots 1 and 2 hold the entropy device and the console.
const SLOT: u32 = 3;
const BIT: u32 = 1 << SLOT;
/// Long enough for a guest that answers, on any machine.
const LONG: Duration = Duration::from_secs(20);
/// Long enough for a guest that looks, and does no more.
const NOTICED: Duration = Duration::from_secs(2);
/// For a guest that is known not to answer.
const SHORT: Duration = Duration::from_millis(20);

/// A machine and what it needs around it.
struct Scene {
    directory: tempfile::TempDir,
    vm: Vm,
}

impl Scene {
    fn new(code: &Code, change: impl FnOnce(&mut MachineConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("disk"), [0; 4096]).unwrap();
        let mut config = machine(&directory, code);
        config.hot_plug = true;
        change(&mut config);
        let vm = start(config).unwrap();
        Self { directory, vm }
    }

    fn manager(&self) -> Manager {
        self.vm.manager()
    }

    fn disk(&self) -> DeviceConfig {
        DeviceConfig::Blk(DiskConfig { path: disk(self.directory.path()), read_only: true })
    }

    fn add(&self, deadline: Duration) -> Result<u8, ChangeError> {
        self.manager().add_device(Some("data".to_owned()), &self.disk(), deadline).map(|info| info.slot)
    }

    fn presence(&self) -> Option<Presence> {
        let info = self.manager().info().unwrap();
        info.devices.iter().find(|device| device.name == "data").map(|device| device.presence)
    }

    fn output(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("output")).unwrap()
    }
}

fn disk(directory: &Path) -> PathBuf {
    directory.join("disk")
}

/// What a driver writes to take the disk in [`SLOT`]: memory decoding, the handshake of status bits, one ring.
fn take_disk(code: Code) -> Code {
    const ECAM: u32 = 0xe800_0000;
    const BAR: u32 = 0xc010_0000 + (SLOT - 1) * 0x4000;
    const STATUS: u32 = BAR + 0x14;
    let code = code.store_word(ECAM + SLOT * 0x8000 + 4, 6);
    let code = code.store_byte(STATUS, 1).store_byte(STATUS, 3);
    // Feature word 1, bit 0: VERSION_1.
    let code = code.store(BAR + 0x08, 1).store(BAR + 0x0c, 1).store_byte(STATUS, 0xb);
    let code = code.store_word(BAR + 0x16, 0);
    let rings = [(0x20, 0x10_0000), (0x28, 0x11_0000), (0x30, 0x12_0000)];
    let code = rings.iter().fold(code, |code, (register, address)| code.store(BAR + register, *address));
    code.store_word(BAR + 0x1c, 1).store_byte(STATUS, 0xf)
}

#[test]
fn a_device_comes_and_goes_as_the_driver_takes_it_and_lets_it_go() {
    if !kvm() {
        return;
    }
    let round = |code: Code| {
        let code = take_disk(code.wait_for(PCI_UP, BIT)).print("+");
        code.wait_for(PCI_DOWN, BIT).store(PCI_EJECT, BIT).print("-")
    };
    let scene = Scene::new(&round(round(round(Code::new()))).power_off(), |_| {});
    let disk = disk(scene.directory.path());
    for _ in 0..3 {
        assert_eq!(scene.add(LONG).unwrap(), 3);
        assert_eq!((scene.presence(), descriptors(&disk)), (Some(Presence::Present), 1));
        scene.manager().remove_device("data", LONG).unwrap();
        assert_eq!(descriptors(&disk), 0);
    }
    wait_for_end(&scene.vm);
    assert_eq!(scene.output(), b"+-+-+-");
}

#[test]
fn registers_are_there_as_long_as_their_device() {
    if !kvm() {
        return;
    }
    const IDENTITY: u32 = 0xe800_0000 + SLOT * 0x8000;
    let code = take_disk(Code::new().wait_for(PCI_UP, BIT).load(IDENTITY).print_eax());
    let code = code.wait_for(PCI_DOWN, BIT).store(PCI_EJECT, BIT).load(IDENTITY).print_eax();
    let scene = Scene::new(&code.power_off(), |_| {});
    scene.add(LONG).unwrap();
    scene.manager().remove_device("data", LONG).unwrap();
    wait_for_end(&scene.vm);
    let (disk, nothing) = ([0xf4, 0x1a, 0x42, 0x10], [0xff; 4]);
    assert_eq!(scene.output(), [disk, nothing].concat());
}

/// How often this process has `file` open.
pub(crate) fn descriptors(file: &Path) -> usize {
    let link = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.unwrap().path()).ok();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(link);
    open.filter(|target| target == file).count()
}

#[test]
fn a_guest_that_ignores_a_device_gets_it_taken_back_and_goes_on() {
    if !kvm() {
        return;
    }
    let scene = Scene::new(&Code::new().print("x").forever(), |_| {});
    for _ in 0..2 {
        assert!(matches!(scene.add(SHORT), Err(ChangeError::Unseen(_))));
        assert_eq!(scene.presence(), None);
    }
    assert_eq!(scene.vm.exit_reason(), None);
}

#[test]
fn a_device_without_a_driver_keeps_its_slot_until_the_guest_lets_it_go() {
    if !kvm() {
        return;
    }
    let code = Code::new().wait_for(PCI_UP, BIT).wait_for(PCI_DOWN, BIT);
    let code = code.wait_for(PCI_UP, BIT << 1).store(PCI_EJECT, BIT).wait_for(PCI_UP, BIT).power_off();
    let scene = Scene::new(&code, |_| {});
    assert!(matches!(scene.add(NOTICED), Err(ChangeError::NoDriver(_))));
    assert_eq!(scene.presence(), Some(Presence::Leaving));
    assert!(matches!(scene.add(SHORT), Err(ChangeError::Name(_))));
    // The next slot; the guest sees this one and lets the first go.
    let (manager, disk) = (scene.manager(), scene.disk());
    let next = manager.add_device(Some("next".to_owned()), &disk, NOTICED);
    assert!(matches!(next, Err(ChangeError::NoDriver(_))), "{next:?}");
    assert_eq!(scene.presence(), None);
    // The first slot is free again: the guest waits for a device there, and ends.
    assert!(matches!(scene.add(LONG), Err(ChangeError::Ended)));
    assert_eq!(wait_for_end(&scene.vm), ExitReason::PowerOff);
}

#[test]
fn a_device_that_the_guest_does_not_let_go_stays_usable_until_it_does() {
    if !kvm() {
        return;
    }
    let code = take_disk(Code::new().wait_for(PCI_UP, BIT));
    let code = code.wait_for(PCI_DOWN, BIT).wait_for(PCI_DOWN, BIT).store(PCI_EJECT, BIT).forever();
    let scene = Scene::new(&code, |_| {});
    scene.add(LONG).unwrap();
    assert!(matches!(scene.manager().remove_device("data", NOTICED), Err(ChangeError::InUse(_))));
    assert_eq!(scene.presence(), Some(Presence::Present));
    scene.manager().remove_device("data", LONG).unwrap();
    assert_eq!(scene.presence(), None);
}

#[test]
fn the_power_button_is_an_event_of_its_own() {
    if !kvm() {
        return;
    }
    let scene = Scene::new(&Code::new().wait_for(EVENTS, 4).power_off(), |_| {});
    scene.manager().press_power_button().unwrap();
    assert_eq!(wait_for_end(&scene.vm), ExitReason::PowerOff);
}

#[test]
fn a_machine_that_ends_ends_its_changes() {
    if !kvm() {
        return;
    }
    for (code, reason) in [
        (Code::new().wait_for(PCI_UP, BIT).power_off(), ExitReason::PowerOff),
        (Code::new().wait_for(PCI_UP, BIT).out_byte(0x602, 1).forever(), ExitReason::Reset),
        (Code::new().wait_for(PCI_UP, BIT).out_byte(0x505, 1).forever(), ExitReason::Panic),
    ] {
        let scene = Scene::new(&code, |_| {});
        assert!(matches!(scene.add(LONG), Err(ChangeError::Ended)));
        assert_eq!(wait_for_end(&scene.vm), reason);
        assert!(matches!(scene.manager().info(), Err(ChangeError::Ended)));
    }
}

#[test]
fn a_paused_guest_sees_nothing_and_goes_on_when_resumed() {
    if !kvm() {
        return;
    }
    let code = take_disk(Code::new().wait_for(PCI_UP, BIT)).print("+").forever();
    let scene = Scene::new(&code, |config| config.vcpus = 2);
    for _ in 0..3 {
        scene.manager().pause().unwrap();
        assert!(matches!(scene.add(SHORT), Err(ChangeError::Unseen(_))));
        scene.manager().resume().unwrap();
    }
    assert_eq!(scene.add(LONG).unwrap(), 3);
}

#[test]
fn what_cannot_be_changed_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let scene = Scene::new(&Code::new().forever(), |_| {});
    let manager = scene.manager();
    assert!(matches!(manager.remove_device("nothing", LONG), Err(ChangeError::NotFound(name)) if name == "nothing"));
    assert!(matches!(manager.remove_device("rng0", LONG), Err(ChangeError::Fixed(_))));
    assert!(matches!(manager.resize_vcpus(0, LONG), Err(ChangeError::Vcpus { given: 0, max: 1 })));
    assert!(matches!(manager.resize_vcpus(2, LONG), Err(ChangeError::Vcpus { given: 2, max: 1 })));
    let missing = DeviceConfig::Blk(DiskConfig { path: "/missing".into(), read_only: false });
    assert!(matches!(manager.add_device(None, &missing, LONG), Err(ChangeError::Config(_))));
    for name in ["", "rng0", &"x".repeat(65)] {
        let refused = manager.add_device(Some(name.to_owned()), &scene.disk(), LONG);
        assert!(matches!(refused, Err(ChangeError::Name(_))), "{name}");
    }

    let scene = Scene::new(&Code::new().forever(), |config| config.hot_plug = false);
    assert!(matches!(scene.add(LONG), Err(ChangeError::NotPluggable)));
    assert!(matches!(scene.manager().press_power_button(), Err(ChangeError::NotPluggable)));
}

#[test]
fn vcpus_come_and_go_as_the_guest_says() {
    if !kvm() {
        return;
    }
    let came = |code: Code, id: u32| {
        let code = code.wait_for(CPU_EVENT, id << 8 | 1).store(CPU_SELECT, id);
        code.store(CPU_OST_EVENT, 1).store(CPU_OST_STATUS, 0x80).store(CPU_OST_STATUS, 0)
    };
    let goes = |code: Code, id: u32| code.wait_for(CPU_EVENT, id << 8 | 3).store(CPU_SELECT, id).store(CPU_EJECT, 1);
    let refuses = |code: Code, id: u32| {
        let code = code.wait_for(CPU_EVENT, id << 8 | 3).store(CPU_SELECT, id);
        code.store(CPU_OST_EVENT, 3).store(CPU_OST_STATUS, 0x82)
    };
    let code = came(came(Code::new(), 1), 2);
    let code = refuses(goes(code, 1), 2);
    let code = came(goes(code, 2), 1).forever();
    let scene = Scene::new(&code, |config| config.vcpus_max = Some(3));
    let manager = scene.manager();
    let resize = |count, deadline| manager.resize_vcpus(count, deadline).unwrap().present;
    assert_eq!(resize(3, LONG), 3);
    // The guest lets one go and refuses the other; events come in the order of the numbers.
    assert_eq!(resize(1, LONG), 2);
    assert_eq!(resize(1, LONG), 1);
    // One that went comes back.
    assert_eq!(resize(2, LONG), 2);
    // The guest no longer looks.
    assert_eq!(resize(3, SHORT), 2);
    assert_eq!(resize(1, SHORT), 2);
    assert_eq!(scene.vm.exit_reason(), None);
}
