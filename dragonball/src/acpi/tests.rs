//! The tables checked by their checksums and by ACPICA's own compiler.

use std::process::Command;

use proptest::prelude::*;

use super::*;

const WINDOW: Range = Range { start: 64 << 30, length: 1 << 40 };
/// All slots but two.
const CHANGING: u32 = !(1 | 1 << 1 | 1 << 6);

fn hardware() -> Hardware {
    Hardware {
        vcpus: 4,
        vcpus_max: 8,
        hot_plug: true,
        pci: Some(Pci { window_64: Some(WINDOW), pins: true, changing: CHANGING }),
        uart: true,
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// The table at guest-physical `address`, whole.
fn table(image: &[u8], address: u64) -> &[u8] {
    let offset = usize::try_from(address - ACPI).unwrap();
    let length = u32::from_le_bytes(image[offset + 4..offset + 8].try_into().unwrap());
    &image[offset..offset + length as usize]
}

/// All tables that the root pointer leads to.
fn tables(image: &[u8]) -> Vec<&[u8]> {
    let xsdt = table(image, u64_at(image, 24));
    let mut found = vec![xsdt];
    for entry in xsdt[36..].chunks_exact(8) {
        let entry = table(image, u64::from_le_bytes(entry.try_into().unwrap()));
        found.push(entry);
        if entry[..4] == *b"FACP" {
            found.push(table(image, u64_at(entry, 140)));
        }
    }
    found
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let image = build(&hardware());
    assert_eq!(&image[..8], b"RSD PTR ");
    let mut names: Vec<_> =
        tables(&image).iter().map(|table| String::from_utf8_lossy(&table[..4]).into_owned()).collect();
    names.sort();
    assert_eq!(names, ["APIC", "DSDT", "FACP", "MCFG", "XSDT"]);
}

#[test]
fn without_pci_no_table_speaks_of_it() {
    let image = build(&Hardware { pci: None, hot_plug: false, ..hardware() });
    assert!(tables(&image).iter().all(|table| table[..4] != *b"MCFG"));
    let bridge = [0x0c, 0x41, 0xd0, 0x0a, 0x08];
    assert!(!image.windows(bridge.len()).any(|bytes| bytes == bridge), "no PNP0A08");
}

proptest! {
    #[test]
    fn checksums_hold_and_tables_fit_whatever_the_hardware(vcpus in 1_u8..=254, more in 0_u8..=253, uart: bool, pci: bool, window: bool) {
        let pci = pci.then(|| Pci { window_64: window.then_some(WINDOW), pins: window, changing: CHANGING });
        let vcpus_max = vcpus.saturating_add(more).min(254);
        let image = build(&Hardware { vcpus, vcpus_max, hot_plug: pci.is_some(), pci, uart });
        prop_assert!(image.len() as u64 <= ACPI_SIZE);
        prop_assert_eq!(sum(&image[..20]), 0);
        prop_assert_eq!(sum(&image[..Rsdp::len()]), 0);
        for table in tables(&image) {
            prop_assert_eq!(sum(table), 0);
        }
    }
}

/// Disassembles every table and compiles the result again; a warning fails the test.
#[test]
fn acpica_accepts_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        panic!("iasl is missing: install the package acpica-tools");
    }
    let directory = tempfile::tempdir().unwrap();
    let image = build(&hardware());
    for table in tables(&image) {
        let name = String::from_utf8_lossy(&table[..4]).to_lowercase();
        let binary = directory.path().join(format!("{name}.aml"));
        std::fs::write(&binary, table).unwrap();
        run_iasl(&["-d"], &binary);
        let output = run_iasl(&["-we"], &binary.with_extension("dsl"));
        assert!(output.contains(" 0 Errors"), "{name}: {output}");
        assert!(!output.contains("Warning  "), "{name}: {output}");
    }
}

#[test]
fn slots_whose_devices_stay_are_none_that_change() {
    let image = build(&hardware());
    let has = |name: &[u8]| image.windows(name.len()).any(|bytes| bytes == name);
    assert!(has(b"S005") && has(b"S007") && has(b"S031"));
    assert!(!has(b"S001") && !has(b"S006") && !has(b"S000"));
}

fn run_iasl(arguments: &[&str], file: &std::path::Path) -> String {
    let output = Command::new("iasl").args(arguments).arg(file).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text
}
