//! Tests of the console device through its rings, with pipes and files as the host's ends.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;

use rstest::rstest;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::{Harness, SECOND_REGION, Segment};

/// A pipe: reading end, writing end.
fn pipe() -> (File, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
}

fn shared(file: &File) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251).to_le_bytes()[0]).collect()
}

/// Reads what is in a pipe right now.
fn available(reader: &mut File) -> Vec<u8> {
    let mut data = Vec::new();
    let mut chunk = [0; 4096];
    let end = HostEnd::new(shared(reader), 0, EventSet::IN);
    while end.is_ready() {
        match reader.read(&mut chunk).unwrap() {
            0 => break,
            count => data.extend_from_slice(&chunk[..count]),
        }
    }
    data
}

#[test]
fn what_the_guest_prints_reaches_a_file_and_the_tail() {
    let mut file = tempfile::tempfile().unwrap();
    let mut harness = Harness::new(Console::new(Some(shared(&file)), None));
    let tail = harness.device.tail();
    let hello = harness.readable(b"hello, ");
    let world = harness.readable(b"world\n");
    assert_eq!(harness.request(1, &[hello, world]), 0);
    drop(harness);
    file.rewind().unwrap();
    let mut printed = String::new();
    file.read_to_string(&mut printed).unwrap();
    assert_eq!(printed, "hello, world\n");
    assert_eq!(tail.text(), "hello, world\n");
}

#[test]
fn a_console_without_output_keeps_the_tail() {
    let mut harness = Harness::new(Console::new(None, None));
    let text = harness.readable(b"nobody reads this");
    harness.request(1, &[text]);
    assert_eq!(harness.device.tail().text(), "nobody reads this");
}

#[rstest]
#[case::with_event_index(Harness::new)]
#[case::without_event_index(Harness::without_event_index)]
fn a_reader_that_does_not_read_holds_the_guest_back_and_loses_nothing(
    #[case] harness: fn(Console) -> Harness<Console>,
) {
    let (mut reader, writer) = pipe();
    let mut harness = harness(Console::new(Some(shared(&writer)), None));
    let data = pattern(600_000);
    let buffer = harness.readable(&data);
    let head = harness.submit(1, &[buffer]);
    // Settling is the test that a full pipe does not make the device spin.
    harness.settle();
    assert_eq!(harness.rings[1].take_used(), None);
    let mut seen = Vec::new();
    harness.run_until(|harness| {
        seen.extend(available(&mut reader));
        harness.rings[1].take_used().is_some_and(|used| used.head == head)
    });
    seen.extend(available(&mut reader));
    assert!(seen == data);
}

#[test]
fn a_request_that_was_half_printed_when_the_device_was_saved_is_printed_once() {
    let (mut reader, writer) = pipe();
    let console = || Console::new(Some(shared(&writer)), None);
    let mut harness = Harness::new(console());
    let data = pattern(300_000);
    let (start, end) = data.split_at(200_000);
    let segments = [harness.readable(start), harness.readable(end)];
    harness.submit(1, &segments);
    harness.settle();
    harness.replace(console()).unwrap();
    let mut seen = Vec::new();
    harness.run_until(|harness| {
        seen.extend(available(&mut reader));
        harness.rings[1].take_used().is_some()
    });
    seen.extend(available(&mut reader));
    assert!(seen == data);
}

#[test]
fn a_reader_that_went_away_does_not_stop_the_guest() {
    let (reader, writer) = pipe();
    drop(reader);
    let mut harness = Harness::new(Console::new(Some(writer.into()), None));
    for text in ["one ", "two"] {
        let buffer = harness.readable(text.as_bytes());
        harness.request(1, &[buffer]);
    }
    assert_eq!(harness.device.tail().text(), "one two");
    harness.settle();
}

#[rstest]
#[case::with_event_index(Harness::new)]
#[case::without_event_index(Harness::without_event_index)]
fn what_is_typed_reaches_the_guest_in_order_and_waits_for_its_buffers(
    #[case] harness: fn(Console) -> Harness<Console>,
) {
    let (reader, mut writer) = pipe();
    let mut harness = harness(Console::new(None, Some(reader.into())));
    writer.write_all(b"typed before there is a buffer").unwrap();
    harness.settle();
    let first = harness.writable(5);
    assert_eq!(harness.request(0, &[first]), 5);
    assert_eq!(harness.bytes(first), b"typed");
    harness.settle();
    let across = [Segment::Writable(GuestAddress(SECOND_REGION - 10), 64)];
    assert_eq!(harness.request(0, &across), 25);
    assert_eq!(harness.bytes(across[0])[..25], *b" before there is a buffer");

    let later = harness.writable(64);
    harness.submit(0, &[later]);
    harness.settle();
    assert_eq!(harness.rings[0].take_used(), None);
    writer.write_all(b"typed later").unwrap();
    assert_eq!(harness.wait_used(0).written, 11);
    assert_eq!(harness.bytes(later)[..11], *b"typed later");
}

#[test]
fn the_end_of_the_input_leaves_the_device_quiet() {
    let (reader, mut writer) = pipe();
    let mut harness = Harness::new(Console::new(None, Some(reader.into())));
    writer.write_all(b"bye").unwrap();
    drop(writer);
    let buffers = [harness.writable(8), harness.writable(8)];
    harness.submit(0, &buffers[..1]);
    harness.submit(0, &buffers[1..]);
    assert_eq!(harness.wait_used(0).written, 3);
    harness.settle();
    assert_eq!(harness.rings[0].take_used(), None);
    assert_eq!(harness.events.watched(), 2);
}

#[test]
fn a_file_as_input_is_read_to_its_end() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(10_000)).unwrap();
    file.rewind().unwrap();
    let mut harness = Harness::new(Console::new(None, Some(file.into())));
    let mut seen = Vec::new();
    let buffer = harness.writable(999);
    while seen.len() < 10_000 {
        let count = harness.request(0, &[buffer]) as usize;
        seen.extend_from_slice(&harness.bytes(buffer)[..count]);
    }
    assert!(seen == pattern(10_000));
}

#[test]
fn a_reset_device_watches_nothing_and_works_again() {
    let (_reader, writer) = pipe();
    let (input, _typist) = pipe();
    let mut harness = Harness::new(Console::new(Some(writer.into()), Some(input.into())));
    let data = harness.readable(&pattern(200_000));
    let buffer = harness.writable(8);
    harness.submit(0, &[buffer]);
    harness.submit(1, &[data]);
    harness.settle();
    assert_eq!(harness.events.watched(), 4);
    harness.reset();
    assert_eq!(harness.events.watched(), 0);
    harness.activate().unwrap();
    harness.settle();
    assert_eq!(harness.events.watched(), 2);
}
