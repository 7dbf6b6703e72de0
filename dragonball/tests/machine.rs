//! The machine as small guests see it: how it starts, ends, and answers accesses. Needs `/dev/kvm`, a software one will do.

mod guest;

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
fn a_read_only_image_is_seen_above_ram_and_does_not_change() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, b"image content").unwrap();
    // Device configuration of the pmem device in slot 1: memory decoding on, then start and size.
    let code = Code::new().store_word(0xe800_8004, 2);
    let code =
        [0xc010_0200, 0xc010_0204, 0xc010_0208].iter().fold(code, |code, address| code.load(*address).print_eax());
    let mut config = machine(&directory, &code.power_off());
    config.pmem.push(dragonball::PmemConfig { path: image.clone(), read_only: true });
    let outcome = run_machine(&directory, config);
    assert_eq!(outcome.words(), [0, 1, 2 << 20], "4 GiB, 2 MiB long");
    assert_eq!(std::fs::read(image).unwrap(), b"image content");
}
