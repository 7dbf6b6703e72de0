//! The machine as small guests see it: how it starts, ends, and answers accesses. Needs `/dev/kvm`, a software one will do.

mod guest;
mod hostile;
mod hot_plug;
mod memory_types;

use dragonball::{ExitReason, start};
use guest::{Code, kvm, machine, run, run_machine, wait_for_end};

#[test]
fn a_guest_prints_and_powers_off() {
    if !kvm() {
        return;
    }
    let outcome = run(&Code::new().print("hello").power_off());
    assert_eq!((outcome.reason, outcome.output.as_slice()), (ExitReason::PowerOff, &b"hello"[..]));
}

#[test]
fn every_end_is_reported_as_what_it_was() {
    if !kvm() {
        return;
    }
    let cases = [
        (Code::new().out_byte(0x602, 1).forever(), ExitReason::Reset),
        (Code::new().out_byte(0x505, 1).forever(), ExitReason::Panic),
        // A fault without any descriptor table: lidt [zeroes]; mov eax, 0x38; mov ds, eax.
        (
            Code::new()
                .raw(&[0x0f, 0x01, 0x1d])
                .raw(&0x30_0000_u32.to_le_bytes())
                .raw(&[0xb8, 0x38, 0, 0, 0, 0x8e, 0xd8]),
            ExitReason::TripleFault,
        ),
    ];
    for (code, expected) in cases {
        assert_eq!(run(&code).reason, expected);
    }
}

#[test]
fn a_guest_that_never_ends_is_stopped() {
    if !kvm() {
        return;
    }
    for code in [Code::new().forever(), Code::new().raw(&[0xf4]).forever()] {
        let directory = tempfile::tempdir().unwrap();
        let vm = start(machine(&directory, &code)).unwrap();
        assert_eq!(vm.exit_reason(), None);
        vm.stop();
        assert_eq!(wait_for_end(&vm), ExitReason::Stopped);
        assert_eq!(vm.wait(), ExitReason::Stopped);
    }
}

#[test]
fn what_is_not_there_reads_as_all_ones() {
    if !kvm() {
        return;
    }
    // in al, 0x64; then memory in the middle of nowhere, and the configuration space of an empty slot.
    let code = Code::new().raw(&[0x31, 0xc0, 0xe4, 0x64]).print_eax();
    let code = code.load(0xf000_0000).print_eax().load(0xe80f_8000).print_eax().power_off();
    assert_eq!(run(&code).words(), [0xff, 0xffff_ffff, 0xffff_ffff]);
}

#[test]
fn the_boot_timer_gives_the_boot_time() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let code = Code::new().store_byte(0xc000_0000, 1).store_byte(0xc000_0000, 123).power_off();
    let mut config = machine(&directory, &code);
    config.boot_timer = true;
    let vm = start(config).unwrap();
    wait_for_end(&vm);
    assert!(vm.boot_time().is_some());
    let names: Vec<_> = vm.stamps().iter().map(|(name, _)| *name).collect();
    assert_eq!(names.first(), Some(&"start"));
    assert!(names.contains(&"init"), "{names:?}");
}

#[test]
fn the_start_information_is_where_ebx_points() {
    if !kvm() {
        return;
    }
    // mov eax, [ebx]
    let outcome = run(&Code::new().raw(&[0x8b, 0x03]).print_eax().power_off());
    assert_eq!(outcome.words(), [0x336e_c578]);
}

#[test]
fn the_ioapic_answers() {
    if !kvm() {
        return;
    }
    let code = Code::new().store(0xfec0_0000, 1).load(0xfec0_0010).print_eax().power_off();
    assert_eq!(run(&code).words(), [0x0007_0020]);
}

#[test]
fn the_entropy_device_is_in_slot_1() {
    if !kvm() {
        return;
    }
    let code = Code::new().load(0xe800_8000).print_eax().load(0xe800_8008).print_eax().power_off();
    assert_eq!(run(&code).words(), [0x1044_1af4, 0xff00_0001]);
}

#[test]
fn registers_read_as_they_were_written() {
    if !kvm() {
        return;
    }
    let register = 0xe800_8000 + 0x10;
    let code = Code::new().load(register).print_eax().store(register, u32::MAX).load(register).print_eax();
    let code = code.store(register, 0xd000_0000).store_word(0xe800_8004, 2).load(register).print_eax();
    // The identity cannot be written; the features' word 1, bit 0 (VERSION_1) is read where the region is now.
    let code = code.store(0xe800_8000, 0).load(0xe800_8000).print_eax();
    let code = code.store(0xd000_0000, 1).load(0xd000_0004).print_eax().power_off();
    assert_eq!(run(&code).words(), [0xc010_0000, 0xffff_c000, 0xd000_0000, 0x1044_1af4, 1]);
}

#[test]
fn a_machine_without_devices_has_an_empty_bus() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut config = machine(&directory, &Code::new().load(0xe800_8000).print_eax().power_off());
    config.console = dragonball::ConsoleOutput::None;
    assert_eq!(run_machine(&directory, config).words(), [0xffff_ffff]);
}

#[test]
fn a_read_only_image_is_seen_above_ram_and_does_not_change() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, b"image content").unwrap();
    // Device configuration of the pmem device in slot 2: memory decoding on, then start and size.
    let code = Code::new().store_word(0xe801_0004, 2);
    let code =
        [0xc010_4200, 0xc010_4204, 0xc010_4208].iter().fold(code, |code, address| code.load(*address).print_eax());
    let mut config = machine(&directory, &code.power_off());
    config.pmem.push(dragonball::PmemConfig { path: image.clone(), read_only: true });
    let outcome = run_machine(&directory, config);
    assert_eq!(outcome.words(), [0, 1, 2 << 20], "4 GiB, 2 MiB long");
    assert_eq!(std::fs::read(image).unwrap(), b"image content");
}

/// The entropy device is in slot 1.
const CONFIG: u32 = 0xe800_8000;
const REGION: u32 = 0xc010_0000;
const TABLE: u32 = REGION + 0x2000;
const DESCRIPTORS: u32 = 0x30_0000;
const AVAILABLE: u32 = 0x30_1000;
const USED: u32 = 0x30_2000;
const VECTOR: u32 = 0x51;
/// The interrupt request register of the local APIC that has vector 0x51, and its bit there.
const REQUESTED: (u32, u32) = (0xfee0_0220, 1 << 17);

/// Sets the entropy device up with one ring and asks it for 16 bytes; its interrupt is vector 0x51, masked or not.
fn ask_for_entropy(masked: bool) -> Code {
    let common = |offset: u32| REGION + offset;
    Code::new()
        // The local APIC is on, interrupts stay off: they are seen as requests.
        .store(0xfee0_00f0, 0x1ff)
        // Memory decoding, bus master, MSI-X.
        .store_word(CONFIG + 4, 6)
        .store_word(CONFIG + 0x42, 0x8000)
        .store(TABLE + 16, 0xfee0_0000)
        .store(TABLE + 20, 0)
        .store(TABLE + 24, VECTOR)
        .store(TABLE + 28, u32::from(masked))
        .store_byte(common(0x14), 3)
        .store(common(0x08), 1)
        .store(common(0x0c), 1)
        .store_byte(common(0x14), 11)
        .store_word(common(0x16), 0)
        .store_word(common(0x18), 4)
        .store_word(common(0x1a), 1)
        .store(common(0x20), DESCRIPTORS)
        .store(common(0x28), AVAILABLE)
        .store(common(0x30), USED)
        .store_word(common(0x1c), 1)
        .store_byte(common(0x14), 15)
        // One descriptor that the device writes: address, length, flags.
        .store(DESCRIPTORS, 0x31_0000)
        .store(DESCRIPTORS + 8, 16)
        .store(DESCRIPTORS + 12, 2)
        .store(AVAILABLE, 1 << 16)
        // The doorbell, then the used ring has one entry.
        .store_word(REGION + 0x1000, 0)
        .wait_for(USED, 1 << 16)
}

#[test]
fn a_device_answers_a_ring_and_interrupts_by_msix() {
    if !kvm() {
        return;
    }
    let code = ask_for_entropy(false).wait_for(REQUESTED.0, REQUESTED.1).load(USED + 8).print_eax().power_off();
    let outcome = run(&code);
    assert_eq!((outcome.reason.clone(), outcome.words()), (ExitReason::PowerOff, vec![16]));
}

#[test]
fn a_masked_interrupt_is_pending_until_it_is_unmasked() {
    if !kvm() {
        return;
    }
    let code = ask_for_entropy(true)
        .wait_for(REGION + 0x3000, 2)
        .load(REQUESTED.0)
        .print_eax()
        .store(TABLE + 28, 0)
        .wait_for(REQUESTED.0, REQUESTED.1)
        .load(REGION + 0x3000)
        .print_eax()
        .power_off();
    assert_eq!(run(&code).words(), [0, 0], "not requested while masked, not pending after");
}

#[test]
fn a_message_that_is_changed_goes_to_its_new_vector() {
    if !kvm() {
        return;
    }
    let again = |code: Code| {
        code.store(AVAILABLE + 4, 0).store(AVAILABLE, 2 << 16).store_word(REGION + 0x1000, 0).wait_for(USED, 2 << 16)
    };
    let code = ask_for_entropy(false).wait_for(REQUESTED.0, REQUESTED.1).store(TABLE + 24, VECTOR + 1);
    let code = again(code).wait_for(REQUESTED.0, REQUESTED.1 | REQUESTED.1 << 1).power_off();
    assert_eq!(run(&code).reason, ExitReason::PowerOff);
}

#[test]
fn a_device_works_again_after_its_reset() {
    if !kvm() {
        return;
    }
    let reset = ask_for_entropy(false).store_byte(REGION + 0x14, 0).store(USED, 0);
    let code = reset.raw(&ask_for_entropy(false).bytes()).load(USED + 8).print_eax().power_off();
    assert_eq!(run(&code).words(), [16]);
}

#[test]
fn every_vcpu_starts_when_it_is_told_to() {
    if !kvm() {
        return;
    }
    // At 0x8000, in real mode: mov ax, 0; mov ds, ax; lock inc byte [0x9000]; hlt; jmp back.
    let trampoline = [0x8e00_00b8, 0x06fe_f0d8, 0xebf4_9000, 0x0000_00fd];
    let code = trampoline.iter().zip((0x8000..).step_by(4)).fold(Code::new(), |code, (word, at)| code.store(at, *word));
    // INIT and start-up to all but self.
    let code = code.store(0xfee0_00f0, 0x1ff).store(0xfee0_0300, 0xc_4500).store(0xfee0_0300, 0xc_4608);
    let directory = tempfile::tempdir().unwrap();
    let mut config = machine(&directory, &code.wait_for(0x9000, 3).power_off());
    config.vcpus = 4;
    assert_eq!(run_machine(&directory, config).reason, ExitReason::PowerOff);
}

#[test]
fn each_vcpu_knows_its_own_number() {
    if !kvm() {
        return;
    }
    // mov eax, 0xb; mov ecx, 1; cpuid; then the core count (EBX) and the APIC id (EDX).
    let code = Code::new().raw(&[0xb8, 0x0b, 0, 0, 0, 0xb9, 1, 0, 0, 0, 0x0f, 0xa2, 0x89, 0xd8, 0x89, 0xd6]);
    let code = code.print_eax().raw(&[0x89, 0xf0]).print_eax().power_off();
    let directory = tempfile::tempdir().unwrap();
    let mut config = machine(&directory, &code);
    config.vcpus = 3;
    assert_eq!(run_machine(&directory, config).words(), [3, 0]);
}
