//! Clients that send what nobody should: whatever comes, the device answers or hangs up, and serves the next one.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use gpu_model::{Device, Identity};
use proptest::prelude::*;

/// A number that is at the edge of something, or any other.
fn edge() -> impl Strategy<Value = u64> {
    let edges =
        [0, 1, 3, 4, 7, 8, 4095, 4096, 1 << 20, (1 << 20) + 1, 16 << 20, 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX];
    prop_oneof![prop::sample::select(edges.to_vec()), any::<u64>()]
}

/// A message with a true header, a request that may exist, and a payload that may fit it.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::collection::vec(edge(), 0..6);
    let tail = prop::collection::vec(any::<u8>(), 0..9);
    (0_u16..16, words, tail, prop::sample::select(vec![0_u32, 0x10])).prop_map(|(command, words, tail, flags)| {
        let mut payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        payload.extend(tail);
        let size = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = vec![7, 0];
        bytes.extend(command.to_le_bytes());
        bytes.extend([size, flags, 0].iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend(payload);
        bytes
    })
}

/// A read or write of a region, mostly where there is something.
fn access() -> impl Strategy<Value = Vec<u8>> {
    let registers = (0_u64..0x20).prop_map(|word| 0x1000 + 4 * word);
    let data = prop::collection::vec(any::<u8>(), 0..12);
    (9_u16..11, prop_oneof![registers, edge()], 0_u32..10, data).prop_map(|(command, offset, region, data)| {
        let count = u32::try_from(data.len()).unwrap();
        let mut bytes = vec![7, 0];
        bytes.extend(command.to_le_bytes());
        let sent = if command == 10 { count } else { 0 };
        bytes.extend([32 + sent, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend(offset.to_le_bytes());
        bytes.extend([region, count].iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend(&data[..sent as usize]);
        bytes
    })
}

/// Sends bytes to a device, hangs up, and waits until it is done with them.
fn send(device: &Device, bytes: &[u8]) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        // How it ends is the device's to say; that it ends is what is tested.
        let server = scope.spawn(|| drop(gpu_model::serve_client(theirs, device)));
        let mut answers = ours.try_clone().unwrap();
        let reader = scope.spawn(move || drop(answers.read_to_end(&mut Vec::new())));
        // Refused when the device has hung up before.
        let _ = ours.write_all(bytes);
        let _ = ours.shutdown(Shutdown::Write);
        server.join().unwrap();
        drop(ours);
        reader.join().unwrap();
    });
}

/// That the device answers a client that behaves.
fn answers(device: &Device) -> bool {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| drop(gpu_model::serve_client(theirs, device)));
        let mut request = vec![1, 0, 4, 0, 16, 0, 0, 0];
        request.resize(16, 0);
        ours.write_all(&request).unwrap();
        let mut answer = [0; 32];
        let answered = ours.read_exact(&mut answer).is_ok() && answer[8] == 1 && answer[12] == 0;
        // The device serves until it sees the end.
        ours.shutdown(Shutdown::Write).unwrap();
        answered
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let device = Device::new(Identity::default(), 1 << 20).unwrap();
        send(&device, &bytes);
        prop_assert!(answers(&device));
    }

    #[test]
    fn any_requests_are_survived(messages in prop::collection::vec(prop_oneof![message(), access()], 0..40)) {
        let device = Device::new(Identity::default(), 1 << 20).unwrap();
        // With memory decoding and bus mastering on, so that registers and the engine are reached.
        let on = [&[1, 0, 10, 0, 34, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0][..], &[6, 0]];
        send(&device, &[on.concat(), messages.concat()].concat());
        prop_assert!(answers(&device));
    }
}
