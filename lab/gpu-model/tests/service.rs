//! Drives a device as its client does, through a socket: what it says of itself, DMA, interrupts, resets, bad messages.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

mod client;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use client::{CONFIG, Client, VIDEO_MEMORY, content, memory, noise, numbers, raised};
use gpu_model::registers::{self, CommandError, DONE, checksum};

const MIB: u64 = 1 << 20;
/// The same, for lengths.
const MIB_LENGTH: usize = 1 << 20;
const EINVAL: u32 = 22;
const EEXIST: u32 = 17;
const ENOTSUP: u32 = 95;

fn failed(error: CommandError) -> u32 {
    DONE | (error as u32) << 8
}

fn field(payload: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(payload[at..at + 4].try_into().unwrap())
}

#[test]
fn it_speaks_version_0_1_and_no_other_major() {
    let mut client = Client::new();
    let answer = client.ask(1, &[&[0, 0, 9, 0][..], b"{\"capabilities\":{}}\0"].concat());
    assert_eq!((answer.error, &answer.payload[..4]), (0, &[0, 0, 1, 0][..]));
    let (end, json) = answer.payload[4..].split_last().unwrap();
    assert_eq!((*end, json.first()), (0, Some(&b'{')));
    assert_eq!(client.ask(1, &[1, 0, 0, 0]).error, ENOTSUP);
}

#[test]
fn it_describes_its_regions_and_interrupts() {
    let mut client = Client::new();
    let information = client.ask(4, &numbers(&[16, 0, 0, 0])).payload;
    assert_eq!(information, numbers(&[16, 3, 9, 5]));
    for (index, size, flags) in
        [(0, 16 * MIB, 3), (1, VIDEO_MEMORY, 7), (2, 0, 0), (3, 32 * MIB, 7), (5, 0, 0), (7, 4096, 3), (8, 0, 0)]
    {
        let answer = client.ask(5, &numbers(&[32, 0, index, 0, 0, 0, 0, 0]));
        assert_eq!(field(&answer.payload, 4), flags, "flags of region {index}");
        assert_eq!(answer.payload[16..24], size.to_le_bytes(), "size of region {index}");
        assert_eq!(answer.descriptors.len(), usize::from(flags & 4 != 0), "file of region {index}");
    }
    for (index, count) in [(0, 1), (1, 0), (2, 8), (3, 0), (4, 0)] {
        let answer = client.ask(7, &numbers(&[16, 0, index, 0]));
        assert_eq!(field(&answer.payload, 12), count, "interrupts of index {index}");
    }
    assert_eq!(client.read(CONFIG, 0, 4), [0xde, 0x10, 0xb0, 0x20]);
    assert_eq!(client.read(CONFIG, 9, 3), [0, 2, 3], "class");
}

#[test]
fn a_mapped_bar_and_the_device_see_the_same_memory() {
    let mut client = Client::ready();
    let file = File::from(client.ask(5, &numbers(&[32, 0, 1, 0, 0, 0, 0, 0])).descriptors.pop().unwrap());
    file.write_all_at(b"from the client", VIDEO_MEMORY - 16).unwrap();
    assert_eq!(client.read(1, VIDEO_MEMORY - 16, 15), b"from the client");
    client.write(1, 0, b"from the device");
    assert_eq!(content(&file, 0, 15), b"from the device");
    assert!(file.set_len(0).is_err(), "the client can cut the memory off");
}

#[test]
fn bars_are_silent_while_memory_decoding_is_off() {
    let mut client = Client::new();
    assert_eq!(client.read(0, registers::ID, 4), [0xff; 4]);
    client.set_register(registers::SCRATCH, 7);
    client.write(CONFIG, 4, &[2, 0]);
    assert_eq!(client.register(registers::ID), registers::ID_VALUE);
    assert_eq!(client.register(registers::SCRATCH), 0);
}

#[test]
fn dma_moves_any_length_both_ways_over_mappings() {
    let mut client = Client::ready();
    let guest = memory(16 * MIB);
    let data = noise(5 * MIB_LENGTH + 13);
    guest.write_all_at(&data, 0x1234).unwrap();
    // Three mappings that touch on the bus, and not in the file's order.
    assert_eq!(client.map(&guest, 3, 0, 0x10_0000, MIB), 0);
    assert_eq!(client.map(&guest, 3, MIB, 0x20_0000, MIB), 0);
    assert_eq!(client.map(&guest, 3, 2 * MIB, 0x30_0000, 14 * MIB), 0);
    assert_eq!(client.run(1, 0x10_1234, 77, data.len() as u64), DONE);
    assert_eq!(client.wide_register(registers::CHECKSUM), checksum(&data));
    assert_eq!(client.run(2, 77, 0x10_0000 + 8 * MIB + 5, data.len() as u64), DONE);
    assert_eq!(client.wide_register(registers::CHECKSUM), checksum(&data));
    assert!(content(&guest, 8 * MIB + 5, data.len()) == data);
    assert_eq!(client.register(registers::COMPLETED), 2);
    assert_eq!(client.run(1, 0, 0, 0), DONE, "nothing at all");
}

#[test]
fn computation_and_checksum_can_be_predicted() {
    let mut client = Client::ready();
    let words = noise(3 * MIB_LENGTH);
    for (index, part) in words.chunks(MIB_LENGTH).enumerate() {
        client.write(1, index as u64 * MIB, part);
    }
    client.set_register(registers::MULTIPLIER, 1_664_525);
    client.set_register(registers::ADDEND, 1_013_904_223);
    assert_eq!(client.run(3, 0, 32 * MIB, words.len() as u64), DONE);
    let step = |word: &[u8; 4]| u32::from_le_bytes(*word).wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let expected: Vec<u8> = words.as_chunks::<4>().0.iter().flat_map(|word| step(word).to_le_bytes()).collect();
    assert!(client.read(1, 34 * MIB, 1 << 20) == expected[2 * MIB_LENGTH..]);
    assert_eq!(client.wide_register(registers::CHECKSUM), checksum(&expected));
    assert_eq!(client.run(4, 0, 0, words.len() as u64), DONE);
    assert_eq!(client.wide_register(registers::CHECKSUM), checksum(&words), "the source has changed");
}

#[test]
fn commands_that_cannot_be_done_say_why() {
    let mut client = Client::ready();
    let guest = memory(MIB);
    assert_eq!(client.map(&guest, 1, 0, 0x1000, 0x1000), 0);
    let range = failed(CommandError::Range);
    let address = failed(CommandError::BusAddress);
    for (what, operation, source, destination, length, expected) in [
        ("past the end of video memory", 1, 0x1000, VIDEO_MEMORY - 1, 2, range),
        ("an offset that wraps", 2, u64::MAX, 0x1000, 2, range),
        ("a length that wraps", 4, 1, 0, u64::MAX, range),
        ("an unaligned computation", 3, 2, 16, 4, range),
        ("a computation over itself", 3, 0, 4, 8, range),
        ("an address that is not mapped", 1, 0x5000, 0, 4, address),
        ("an address that wraps", 1, u64::MAX, 0, 4, address),
        ("a write to what may only be read", 2, 0, 0x1000, 4, address),
        ("no operation", 9, 0, 0, 4, failed(CommandError::Command)),
    ] {
        // A command that is none ends at once, on vector 0.
        let eventfd = client.eventfd(2, 0);
        if expected == failed(CommandError::Command) {
            client.set_register(registers::COMMAND, operation);
            assert!(raised(&eventfd, 60_000), "{what}");
            assert_eq!(client.register(registers::STATUS), expected, "{what}");
        } else {
            assert_eq!(client.run(operation, source, destination, length), expected, "{what}");
        }
    }
    assert_eq!(client.run(1, 0x1800, 0, 0x1000), address);
    assert_eq!(client.wide_register(registers::FAULT_ADDRESS), 0x2000);
    client.write(CONFIG, 4, &[2, 0]);
    assert_eq!(client.run(1, 0x1000, 0, 4), failed(CommandError::BusMaster));
}

#[test]
fn unmapped_memory_is_out_of_reach() {
    let mut client = Client::ready();
    let guest = memory(MIB);
    assert_eq!(client.map(&guest, 3, 0, 0x1000, 0x1000), 0);
    assert_eq!(client.map(&guest, 3, 0x1000, 0x2000, 0x1000), 0);
    assert_eq!(client.map(&guest, 3, 0, 0x1fff, 0x1000), EEXIST);
    assert_eq!(client.unmap(0, 0x1800, 0x1000).error, EINVAL, "a part of a mapping");
    let answer = client.unmap(0, 0, 0x2000);
    assert_eq!((answer.error, &answer.payload[16..24]), (0, &0x1000_u64.to_le_bytes()[..]));
    assert_eq!(client.run(2, 0, 0x1000, 4), failed(CommandError::BusAddress));
    assert_eq!(client.run(2, 0, 0x2000, 4), DONE);
    assert_eq!(client.unmap(2, 0, 0).error, 0, "all");
    assert_eq!(client.run(2, 0, 0x2000, 4), failed(CommandError::BusAddress));
}

#[test]
fn the_line_is_raised_once_until_it_is_unmasked_and_not_beside_msix() {
    let mut client = Client::ready();
    let line = client.eventfd(0, 0);
    client.set_register(registers::COMMAND, 9);
    assert!(!raised(&line, 0), "raised though it is not enabled");
    client.set_register(registers::INTERRUPT_ENABLE, 1);
    assert!(raised(&line, 0));
    assert_eq!(client.read(CONFIG, 6, 1)[0] & 8, 8, "interrupt status");
    client.set_register(registers::COMMAND, 9);
    assert!(!raised(&line, 0), "raised while masked");
    assert_eq!(client.ask(8, &numbers(&[20, 0x11, 0, 0, 1])).error, 0, "unmask");
    assert!(raised(&line, 0), "still pending");
    client.set_register(registers::INTERRUPT_STATUS, 1);
    assert_eq!(client.ask(8, &numbers(&[20, 0x11, 0, 0, 1])).error, 0, "unmask");
    assert!(!raised(&line, 0), "nothing is pending");
    assert_eq!(client.read(CONFIG, 6, 1)[0] & 8, 0, "interrupt status");
    client.write(CONFIG, 4, &[6, 4]);
    client.set_register(registers::COMMAND, 9);
    assert!(!raised(&line, 0), "raised though the command register forbids it");
    client.write(CONFIG, 4, &[6, 0]);
    assert!(raised(&line, 0));
    assert_eq!(client.ask(8, &numbers(&[20, 0x11, 0, 0, 1])).error, 0, "unmask");
    assert!(raised(&line, 0));
    let vector = client.eventfd(2, 0);
    assert_eq!(client.ask(8, &numbers(&[20, 0x11, 0, 0, 1])).error, 0, "unmask");
    assert!(!raised(&line, 0), "raised beside MSI-X");
    client.set_register(registers::COMMAND, 9);
    assert!(raised(&vector, 0));
}

#[test]
fn interrupts_are_looped_back_and_disconnected() {
    let mut client = Client::new();
    let (second, third) = (client.eventfd(2, 1), client.eventfd(2, 2));
    assert_eq!(client.ask(8, &numbers(&[20, 0x21, 2, 1, 2])).error, 0);
    assert!(raised(&second, 0) && raised(&third, 0));
    let chosen = [numbers(&[20, 0x22, 2, 1, 2]), vec![0, 1]].concat();
    assert_eq!(client.ask(8, &chosen).error, 0);
    assert!(!raised(&second, 0) && raised(&third, 0));
    assert_eq!(client.ask(8, &numbers(&[20, 0x21, 2, 0, 0])).error, 0, "disable");
    assert_eq!(client.ask(8, &numbers(&[20, 0x21, 2, 0, 8])).error, 0);
    assert!(!raised(&second, 0) && !raised(&third, 0));
}

#[test]
fn a_full_eventfd_stops_nobody() {
    let mut client = Client::ready();
    let vector = client.eventfd(2, 0);
    vector.write(u64::MAX - 1).unwrap();
    client.set_register(registers::COMMAND, 9);
    assert_eq!(client.register(registers::COMPLETED), 1);
}

#[test]
fn each_kind_of_reset_clears_registers_and_memory() {
    let function_level = |client: &mut Client| client.write(CONFIG, 0x81, &[0x80]);
    let by_client = |client: &mut Client| assert_eq!(client.ask(13, &[]).error, 0);
    for reset in [function_level as fn(&mut Client), by_client] {
        let mut client = Client::ready();
        let guest = memory(MIB);
        assert_eq!(client.map(&guest, 3, 0, 0, MIB), 0);
        client.set_register(registers::SCRATCH, 5);
        client.write(1, 0, b"secret");
        client.write(3, 0, b"secret");
        assert_eq!(client.run(4, 0, 0, 6), DONE);
        let vector = client.eventfd(2, 3);
        reset(&mut client);
        assert_eq!(client.read(CONFIG, 4, 2), [0, 0]);
        assert_eq!(client.read(CONFIG, 0x81, 1)[0] & 0x80, 0);
        client.write(CONFIG, 4, &[6, 0]);
        for register in [registers::SCRATCH, registers::STATUS, registers::COMPLETED] {
            assert_eq!(client.register(register), 0);
        }
        assert_eq!(client.register(registers::RESETS), 1);
        assert_eq!((client.read(1, 0, 6), client.read(3, 0, 6)), (vec![0; 6], vec![0; 6]));
        // Mappings and interrupts are the client's.
        client.write(0, registers::LENGTH, &4_u64.to_le_bytes());
        client.set_register(registers::COMMAND, 1 | 3 << 8);
        assert!(raised(&vector, 60_000));
        assert_eq!(client.register(registers::STATUS), DONE);
    }
}

#[test]
fn a_reset_ends_a_command_that_runs() {
    let mut client = Client::ready();
    let guest = memory(MIB);
    for page in 0..64 {
        assert_eq!(client.map(&guest, 3, 0, page * MIB, MIB), 0);
    }
    client.write(0, registers::LENGTH, &VIDEO_MEMORY.to_le_bytes());
    for round in 1..=20 {
        client.set_register(registers::COMMAND, 1);
        client.write(CONFIG, 0x81, &[0x80]);
        client.write(CONFIG, 4, &[6, 0]);
        assert_eq!(client.register(registers::STATUS), 0);
        assert_eq!(client.register(registers::RESETS), round);
        client.write(0, registers::LENGTH, &VIDEO_MEMORY.to_le_bytes());
    }
}

#[test]
fn bad_requests_are_refused_and_the_next_one_is_answered() {
    let mut client = Client::ready();
    let access = |offset: u64, region, count| [offset.to_le_bytes().to_vec(), numbers(&[region, count])].concat();
    let guest = memory(MIB);
    let wide = |values: &[u64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let map = |offset, address, size| [numbers(&[32, 3]), wide(&[offset, address, size])].concat();
    let table: Vec<(&str, u16, Vec<u8>, u32)> = vec![
        ("no such request", 99, vec![], ENOTSUP),
        ("a request of the server", 11, vec![0; 16], ENOTSUP),
        ("an empty version", 1, vec![], EINVAL),
        ("a short mapping", 2, vec![0; 31], EINVAL),
        ("a mapping that wraps", 2, map(0, u64::MAX, 2), EINVAL),
        ("a mapping of a file's end that wraps", 2, map(u64::MAX, 0, 4096), EINVAL),
        ("an empty mapping", 2, map(0, 0, 0), EINVAL),
        ("dirty pages", 3, [numbers(&[24, 1]), wide(&[0, 4096])].concat(), EINVAL),
        ("an unmapping that wraps", 3, [numbers(&[24, 0]), wide(&[u64::MAX, 2])].concat(), EINVAL),
        ("a region that is none", 5, numbers(&[32, 0, 9, 0, 0, 0, 0, 0]), EINVAL),
        ("interrupts of no index", 7, numbers(&[16, 0, 5, 0]), EINVAL),
        ("interrupts past the last", 8, numbers(&[20, 0x21, 2, 7, 2]), EINVAL),
        ("interrupts that wrap", 8, numbers(&[20, 0x21, 2, u32::MAX, 2]), EINVAL),
        ("interrupts with too few bytes", 8, [numbers(&[20, 0x22, 2, 0, 8]), vec![1]].concat(), EINVAL),
        ("interrupts without an action", 8, numbers(&[20, 0x4, 2, 0, 1]), EINVAL),
        ("masked vectors", 8, numbers(&[20, 0x9, 2, 0, 1]), EINVAL),
        ("a read past the end", 9, access(4094, CONFIG, 4), EINVAL),
        ("a read that wraps", 9, access(u64::MAX, 1, 2), EINVAL),
        ("a read of too much", 9, access(0, 1, u32::MAX), EINVAL),
        ("a read of a region that is none", 9, access(0, 77, 4), EINVAL),
        ("a read of a region without bytes", 9, access(0, 2, 4), EINVAL),
        ("a write past the end", 10, [access(4095, CONFIG, 2), vec![0; 2]].concat(), EINVAL),
        ("a write with too few bytes", 10, [access(0, 1, 8), vec![0; 4]].concat(), EINVAL),
        ("a write with too many bytes", 10, [access(0, 1, 1), vec![0; 4]].concat(), EINVAL),
    ];
    for (what, command, payload, error) in table {
        let descriptors = if command == 2 { vec![guest.as_raw_fd()] } else { vec![] };
        assert_eq!(client.ask_with(command, &payload, &descriptors).error, error, "{what}");
        assert_eq!(client.register(registers::ID), registers::ID_VALUE, "after {what}");
    }
    let (_, pipe) = nix::unistd::pipe().unwrap();
    let answer = client.ask_with(2, &map(0, 0, 4096), &[pipe.as_raw_fd()]);
    assert_eq!(answer.error, EINVAL, "a pipe as memory");
    let many = vec![guest.as_raw_fd(); 9];
    assert_eq!(client.ask_with(8, &numbers(&[20, 0x24, 2, 0, 8]), &many).error, EINVAL, "too many eventfds");
    assert_eq!(client.ask_with(8, &numbers(&[20, 0x24, 2, 0, 3]), &many[..2]).error, EINVAL, "too few eventfds");
    assert!(client.finish().is_ok());
}

#[test]
fn registers_take_aligned_words_only() {
    let mut client = Client::ready();
    for (offset, data) in [(1, &[1, 2, 3, 4][..]), (0, &[1][..]), (0, &[1; 12][..]), (2, &[1, 2][..])] {
        client.write(0, registers::SCRATCH + offset, data);
    }
    assert_eq!(client.register(registers::SCRATCH), 0);
    assert_eq!(client.read(0, 16 * MIB - 4, 4), [0; 4]);
}

#[test]
fn requests_without_reply_get_none() {
    let mut client = Client::ready();
    let write = [registers::SCRATCH.to_le_bytes().to_vec(), numbers(&[0, 4, 77])].concat();
    client.send(10, &write, 0x10, &[]);
    client.send(99, &[], 0x10, &[]);
    assert_eq!(client.register(registers::SCRATCH), 77);
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let mut endings: Vec<Vec<u8>> = Vec::new();
    let mut client = Client::new();
    endings.push(client.header(9, u32::MAX as usize - 16, 0));
    endings.push([vec![1, 0, 9, 0], numbers(&[15, 0, 0])].concat());
    endings.push(client.header(9, 0, 1));
    for bytes in endings {
        let mut client = Client::new();
        client.stream.write_all(&bytes).unwrap();
        assert_eq!(client.stream.read(&mut [0]).unwrap(), 0, "{bytes:?}");
        assert!(client.finish().is_err(), "{bytes:?}");
    }
    // Gone in the middle of a message.
    let mut client = Client::new();
    let part = client.header(10, 100, 0);
    client.stream.write_all(&part).unwrap();
    assert!(client.finish().is_err());
    assert!(Client::new().finish().is_ok(), "gone between messages");
}
