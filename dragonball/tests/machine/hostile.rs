//! A guest that writes to its hot-plug registers whatever comes, while the host changes the machine.

use std::time::Duration;

use dragonball::{DeviceConfig, DiskConfig, start};

use crate::guest::{Code, kvm, machine, wait_for_end};
use crate::hot_plug::descriptors;

/// For a guest that does not do as it is asked, but by chance.
const SHORT: Duration = Duration::from_millis(20);
const ROUNDS: u8 = 40;
const VCPUS: u8 = 4;

/// Writes and reads the first registers in no order, with small numbers from a linear congruential generator.
fn noise() -> Code {
    Code::new()
        // mov ebx, 1; then, for ever: imul ebx, ebx, 1664525; add ebx, 1013904223
        .raw(&[0xbb, 1, 0, 0, 0])
        .raw(&[0x69, 0xdb, 0x0d, 0x66, 0x19, 0x00, 0x81, 0xc3, 0x5f, 0xf3, 0x6e, 0x3c])
        // mov ecx, ebx; shr ecx, 16; and ecx, 0x3c; mov edx, ebx; shr edx, 24
        .raw(&[0x89, 0xd9, 0xc1, 0xe9, 0x10, 0x83, 0xe1, 0x3c, 0x89, 0xda, 0xc1, 0xea, 0x18])
        // mov [0xc0001000 + ecx], edx; mov eax, [0xc0001000 + ecx]; jmp to the multiplication
        .raw(&[0x89, 0x91, 0x00, 0x10, 0x00, 0xc0, 0x8b, 0x81, 0x00, 0x10, 0x00, 0xc0, 0xeb, 0xd9])
}

#[test]
fn a_guest_that_writes_anything_to_its_hot_plug_registers_harms_nobody() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let mut config = machine(&directory, &noise());
    (config.hot_plug, config.vcpus_max) = (true, Some(VCPUS));
    let vm = start(config).unwrap();
    let manager = vm.manager();
    let disk = DeviceConfig::Blk(DiskConfig { path: path.clone(), read_only: true });
    for round in 0..ROUNDS {
        // Whether each succeeds is the guest's choice; that each answers is ours.
        let _added = manager.add_device(None, &disk, SHORT);
        let resized = manager.resize_vcpus(round % VCPUS + 1, SHORT).unwrap();
        assert!((1..=VCPUS).contains(&resized.present), "{resized:?}");
        let _removed = manager.remove_device("blk0", SHORT);
        assert!(manager.memory_types().unwrap().equal);
    }
    // While it stands still, what is open is what is there.
    manager.pause().unwrap();
    let present = manager.info().unwrap().devices.iter().filter(|device| device.kind == "blk").count();
    assert_eq!(descriptors(&path), present);
    manager.resume().unwrap();
    assert_eq!(vm.exit_reason(), None);
    vm.stop();
    wait_for_end(&vm);
    drop(vm);
    assert_eq!(descriptors(&path), 0, "nothing is left of the devices");
}
