//! Tests of the persistent memory device: its mapping, and its flush requests through a ring.

use std::io::Write;

use rstest::rstest;

use super::*;
use crate::virtio::testing::Harness;

fn image(length: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let data = (0..length).map(|at| at.to_le_bytes()[0] | 1).collect::<Vec<_>>();
    file.write_all(&data).unwrap();
    file
}

fn device(length: usize, mode: PmemMode) -> Pmem {
    let mut pmem = Pmem::open(image(length).path(), mode).unwrap();
    pmem.set_start(GuestAddress(0x1_0000_0000));
    pmem
}

fn mapped_bytes(pmem: &Pmem) -> Vec<u8> {
    let mapping = pmem.mapping();
    // SAFETY: the mapping lives as long as the device, and nobody writes to it meanwhile.
    unsafe { std::slice::from_raw_parts(mapping.host_address().as_ptr(), usize::try_from(mapping.len()).unwrap()) }
        .to_vec()
}

#[rstest]
#[case(1, 2 << 20)]
#[case(4097, 2 << 20)]
#[case(2 << 20, 2 << 20)]
#[case((2 << 20) + 1, 4 << 20)]
fn a_file_of_any_length_is_mapped_aligned_with_zeroes_behind(
    #[case] length: usize,
    #[case] expected: u64,
    #[values(PmemMode::ReadOnly, PmemMode::CopyOnWrite)] mode: PmemMode,
) {
    let pmem = device(length, mode);
    assert_eq!(pmem.mapping().len(), expected);
    assert_eq!(pmem.mapping().host_address().as_ptr().align_offset(2 << 20), 0);
    let bytes = mapped_bytes(&pmem);
    assert!(bytes[..length].iter().enumerate().all(|(at, &byte)| byte == at.to_le_bytes()[0] | 1));
    assert!(bytes[length..].iter().all(|&byte| byte == 0));
}

#[test]
fn the_configuration_space_holds_start_and_length() {
    let config = device(3 << 20, PmemMode::ReadOnly).config();
    assert_eq!(config, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0]);
}

#[test]
fn writes_to_a_copy_on_write_device_never_reach_the_file() {
    let file = image(5000);
    let before = std::fs::read(file.path()).unwrap();
    let pmem = Pmem::open(file.path(), PmemMode::CopyOnWrite).unwrap();
    assert!(!pmem.mapping().is_read_only());
    // SAFETY: the mapping is writable, longer than this, and nobody else uses it.
    unsafe { pmem.mapping().host_address().as_ptr().write_bytes(0, 5000) };
    assert!(mapped_bytes(&pmem).iter().all(|&byte| byte == 0));
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
}

#[test]
fn what_is_no_file_with_contents_is_refused() {
    let open = |path: &Path| Pmem::open(path, PmemMode::ReadOnly).map(|_| ());
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(open(directory.path()), Err(PmemError::NotAFile(_))));
    assert!(matches!(open(&directory.path().join("none")), Err(PmemError::Open { .. })));
    assert!(matches!(open(image(0).path()), Err(PmemError::Empty(_))));
}

#[test]
fn a_flush_succeeds_and_an_unknown_request_fails() {
    let mut harness = Harness::new(device(1, PmemMode::ReadOnly));
    for (kind, status) in [(0_u32, 0_u32), (1, u32::MAX), (0, 0)] {
        let request = harness.readable(&kind.to_le_bytes());
        let response = harness.writable(4);
        assert_eq!(harness.request(0, &[request, response]), 4);
        assert_eq!(harness.bytes(response), status.to_le_bytes());
    }
}

#[rstest]
#[case::without_a_type(3, 4)]
#[case::without_room_for_the_response(4, 3)]
fn a_short_request_is_a_protocol_error(#[case] readable: u32, #[case] writable: u32) {
    let mut harness = Harness::new(device(1, PmemMode::ReadOnly));
    let request = harness.readable(&vec![0; readable as usize]);
    let response = harness.writable(writable);
    harness.submit(0, &[request, response]);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[test]
fn a_flush_that_a_saved_device_had_not_looked_at_is_answered_by_the_restored_one() {
    let mut harness = Harness::new(device(1, PmemMode::ReadOnly));
    let segments = [harness.readable(&[0; 4]), harness.writable(4)];
    harness.request(0, &segments);
    let head = harness.submit(0, &segments);
    harness.replace(device(1, PmemMode::ReadOnly)).unwrap();
    assert_eq!(harness.wait_used(0).head, head);
}

#[test]
fn a_state_of_another_region_is_refused() {
    let state = device(1, PmemMode::ReadOnly).save().unwrap();
    let mut longer = device(3 << 20, PmemMode::ReadOnly);
    assert!(matches!(longer.restore(&state), Err(DeviceError::InvalidState(_))));
    let mut elsewhere = device(1, PmemMode::ReadOnly);
    elsewhere.set_start(GuestAddress(0));
    assert!(matches!(elsewhere.restore(&state), Err(DeviceError::InvalidState(_))));
}
