//! Tests of the overlay: what a guest can see and change, for devices as they are and for any bytes.

use proptest::prelude::*;
use rstest::rstest;

use super::*;

const ALL: Interrupts = Interrupts { intx: 1, msi: 32, msix: 2048 };

/// A display with power management, PCI Express, MSI and MSI-X, and three extended capabilities of which one is hidden.
fn device() -> Vec<u8> {
    let mut bytes = vec![0; EXTENDED];
    bytes[..4].copy_from_slice(&[0xde, 0x10, 0xb0, 0x20]);
    bytes[STATUS] = STATUS_CAPABILITIES;
    bytes[8..12].copy_from_slice(&[0xa1, 0, 2, 3]);
    bytes[HEADER_TYPE] = MULTI_FUNCTION;
    // A base address and a pin of the host.
    bytes[0x10..0x14].copy_from_slice(&0xfd00_0000_u32.to_le_bytes());
    bytes[0x30..0x34].copy_from_slice(&0xfe00_0001_u32.to_le_bytes());
    bytes[INTERRUPT_PIN] = 1;
    bytes[POINTER] = 0x60;
    bytes[0x60..0x68].copy_from_slice(&[id::POWER, 0x68, 3, 0, 8, 0, 0, 0]);
    bytes[0x68..0x6c].copy_from_slice(&[id::MSI, 0x80, 0x88, 0x01]);
    bytes[0x80..0x8c].copy_from_slice(&[id::MSIX, 0xa0, 7, 0, 0, 0, 0xb9, 0, 0, 0, 0xba, 0]);
    bytes[0xa0..0xa4].copy_from_slice(&[id::EXPRESS, 0x14, 2, 0]);
    for (offset, id, next) in
        [(0x100_usize, 0x10_u32, 0x140_u32), (0x140, 0x01, 0x180), (0x180, 0x15, 0x1c0), (0x1c0, 0x03, 0)]
    {
        bytes[offset..offset + 4].copy_from_slice(&(next << 20 | 1 << 16 | id).to_le_bytes());
        bytes[offset + 4] = 0x77;
    }
    bytes
}

/// What the guest reads, when the device still has what it had at the beginning.
fn seen(overlay: &Overlay, device: &[u8]) -> Vec<u8> {
    let mut data = device.to_vec();
    overlay.cover(0, &mut data);
    data
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

#[test]
fn the_guest_sees_the_devices_identity_and_none_of_the_hosts_addresses() {
    let overlay = Overlay::new(device(), ALL, None);
    let seen = seen(&overlay, &device());
    assert_eq!((word(&seen, 0), word(&seen, 8)), (0x20b0_10de, 0x0302_00a1));
    assert_eq!((word(&seen, 0x10), word(&seen, 0x30), seen[HEADER_TYPE], seen[INTERRUPT_PIN]), (0, 0, 0, 1));
}

#[test]
fn capabilities_that_concern_others_are_unlinked_and_empty() {
    let overlay = Overlay::new(device(), ALL, None);
    let seen = seen(&overlay, &device());
    let list: Vec<_> = extended(&seen).iter().map(|one| (one.id, one.offset)).collect();
    assert_eq!(list, [(0, 0x100), (1, 0x140), (3, 0x1c0)]);
    assert_eq!((seen[0x104], seen[0x144], seen[0x184], seen[0x1c4]), (0, 0x77, 0, 0x77));
    let list: Vec<_> = conventional(&seen).iter().map(|one| one.id).collect();
    assert_eq!(list, [1, 5, 0x11, 0x10]);
}

#[test]
fn interrupts_that_the_host_cannot_pass_on_are_hidden() {
    let overlay = Overlay::new(device(), Interrupts::default(), None);
    let seen = seen(&overlay, &device());
    let list: Vec<_> = conventional(&seen).iter().map(|one| one.id).collect();
    assert_eq!(list, [1, 0x10]);
    assert!(overlay.msi().is_none() && overlay.msix().is_none());
}

#[test]
fn the_clique_capability_lies_in_a_free_place_at_the_front() {
    let overlay = Overlay::new(device(), ALL, Some(3));
    let seen = seen(&overlay, &device());
    let place = usize::from(seen[POINTER]);
    assert_eq!(seen[place + 2..place + 8], [8, b'P', b'2', b'P', 3 << 3, 0]);
    assert_eq!(conventional(&seen).len(), 5);
    // The capability of PCI Express reaches from 0xa0 to 0xdc.
    assert!(!(0xa0 - 7..0xdc).contains(&place), "{place:x}");
}

#[rstest]
#[case(BarRequest { length: 16 << 20, wide: false, prefetchable: false }, 0xff00_0000, 0)]
#[case(BarRequest { length: 8 << 30, wide: true, prefetchable: true }, 0xc, 0xffff_fffe)]
#[case(BarRequest { length: 256 << 30, wide: true, prefetchable: true }, 0xc, 0xffff_ffc0)]
#[case(BarRequest { length: 16, wide: true, prefetchable: false }, 0xffff_fff4, 0xffff_ffff)]
fn a_base_address_register_tells_its_size_and_keeps_its_kind(
    #[case] request: BarRequest,
    #[case] low: u32,
    #[case] high: u32,
) {
    let mut overlay = Overlay::new(device(), ALL, None);
    overlay.set_bar(1, 0, request);
    assert_eq!(overlay.write(0x14, &[0xff; 8]), None, "the device has addresses of its own");
    let seen = seen(&overlay, &device());
    assert_eq!((word(&seen, 0x14), word(&seen, 0x18)), (low, high));
}

#[test]
fn memory_is_decoded_while_the_guest_wants_it_and_the_device_is_powered() {
    let mut overlay = Overlay::new(device(), ALL, None);
    assert!(!overlay.decodes_memory());
    assert_eq!(overlay.write(COMMAND, &[0x07, 0x04]), Some(vec![0x46, 0x05]), "without I/O ports");
    assert!(overlay.decodes_memory());
    assert_eq!(seen(&overlay, &device())[COMMAND], 2);
    overlay.write(0x64, &[3, 0]);
    assert!(!overlay.decodes_memory());
    overlay.write(0x64, &[8, 0]);
    assert!(overlay.decodes_memory());
}

#[test]
fn messages_follow_what_the_guest_programmed() {
    let mut overlay = Overlay::new(device(), ALL, None);
    let none = overlay.msi().unwrap();
    assert_eq!((none.enabled, none.vectors.len()), (false, 1));
    overlay.write(0x6c, &0xfee0_1000_u32.to_le_bytes());
    overlay.write(0x70, &1_u32.to_le_bytes());
    overlay.write(0x74, &0x4045_u16.to_le_bytes());
    overlay.write(0x78, &0b10_u32.to_le_bytes());
    // Two vectors; the mask of the second is set.
    overlay.write(0x6a, &[0x11]);
    let message = Message { address: 0x1_fee0_1000, data: 0x4044 };
    assert_eq!(overlay.msi(), Some(Msi { enabled: true, vectors: vec![Some(message), None] }));
    overlay.write(0x6a, &[0xff]);
    assert_eq!(overlay.msi().unwrap().vectors.len(), 16, "no more than the device has");
}

#[test]
fn the_table_of_messages_is_where_the_device_has_it() {
    let mut overlay = Overlay::new(device(), Interrupts { intx: 1, msi: 1, msix: 4 }, None);
    let msix = overlay.msix().unwrap();
    assert_eq!((msix.vectors, msix.table, msix.pending), (4, (0, 0xb9_0000), (0, 0xba_0000)));
    assert_eq!(overlay.write(0x82, &[0xff, 0xff]), None);
    assert_eq!(overlay.msix_control(), MsixControl { enabled: true, masked: true });
    assert_eq!(seen(&overlay, &device())[0x82..0x84], [3, 0xc0]);
}

proptest! {
    #[test]
    fn no_device_and_no_guest_make_it_panic_or_show_a_host_address(
        bytes in prop::collection::vec(any::<u8>(), 0..=EXTENDED),
        msi in 0_u32..64, msix in 0_u32..4096, clique: Option<u8>,
        writes in prop::collection::vec((0_usize..0x1010, prop::collection::vec(any::<u8>(), 1..9)), 0..32),
    ) {
        let mut overlay = Overlay::new(bytes.clone(), Interrupts { intx: 0, msi, msix }, clique);
        overlay.set_bar(0, 0, BarRequest { length: 4096, wide: true, prefetchable: true });
        for (register, data) in &writes {
            if let Some(forwarded) = overlay.write(*register, data) {
                prop_assert_eq!(forwarded.len(), data.len());
                for (bits, offset) in forwarded.iter().zip(*register..) {
                    prop_assert!(!(BAR_REGISTERS..BAR_REGISTERS + 24).contains(&offset) || *bits == 0);
                }
            }
            overlay.msi();
            let address = overlay.bar(0, BarRequest { length: 4096, wide: true, prefetchable: true });
            prop_assert!(address.is_multiple_of(4096));
        }
        let mut before = bytes;
        before.resize(overlay.size(), 0xff);
        let seen = seen(&overlay, &before);
        prop_assert!(seen[BAR_REGISTERS + 8..BAR_REGISTERS + 24].iter().all(|byte| *byte == 0));
        for capability in extended(&seen) {
            prop_assert!(capability.id == 0 || visible_extended(&capability));
        }
    }
}
