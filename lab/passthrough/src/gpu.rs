//! The lab's GPU model: registers, video memory to its last byte, copies both ways, a computation, an interrupt, and a
//! reset. Its registers are listed in the documentation of the package `gpu-model`.

use std::fs;

use crate::Outcome;
use crate::interrupt::Counted;
use crate::memory::{HUGE_PAGE, HugePages, PAGE, Pages};
use crate::pci::{Function, Registers};

const ID: usize = 0x0000;
const VIDEO_MEMORY_SIZE: usize = 0x0008;
const SOURCE: usize = 0x1000;
const DESTINATION: usize = 0x1008;
const LENGTH: usize = 0x1010;
const MULTIPLIER: usize = 0x1018;
const ADDEND: usize = 0x101c;
const COMMAND: usize = 0x1020;
const STATUS: usize = 0x1024;
const DONE: u32 = 1 << 1;
const CHECKSUM: usize = 0x1030;
const FAULT_ADDRESS: usize = 0x1038;
const RESETS: usize = 0x104c;
const TO_VIDEO: u32 = 1;
const TO_MEMORY: u32 = 2;
const COMPUTE: u32 = 3;
const SUM: u32 = 4;

/// The error of an address on the bus that nothing is at.
const BUS_ADDRESS: u32 = 1;

/// Pages that are moved.
const PAGES: usize = 16;
/// The vector of MSI-X that a copy interrupts by.
const VECTOR: u8 = 3;
/// Bytes that are moved where it shall be much.
const MUCH: usize = 256 << 20;

/// Moves pages into the video memory, computes there, moves them back, and resets the device.
pub(crate) fn check(function: &Function) -> Outcome {
    function.enable().map_err(|error| error.to_string())?;
    let registers = function.map("resource0", 0, 16 << 20)?;
    let size = registers.read_64(VIDEO_MEMORY_SIZE);
    let (first, last) = function.resource(1).ok_or("it has no BAR 1")?;
    if registers.read(ID) != 0x1700_00a1 || last - first + 1 != size {
        return Err(format!("id {:#x}, BAR 1 {first:#x}-{last:#x}, video memory {size:#x}", registers.read(ID)));
    }
    let kind = end_of_video_memory(function, size)?;
    let words = PAGES * PAGE / 4;
    let (source, result) = (Pages::new(PAGES)?, Pages::new(PAGES)?);
    (0..words).for_each(|index| source.write(index, pattern(index)));
    let base = size / 2;
    for page in 0..source.count() {
        let place = base + (page * PAGE) as u64;
        run(&registers, TO_VIDEO, source.address(page)?, place, PAGE)?;
    }
    registers.write(MULTIPLIER, 3);
    registers.write(ADDEND, 7);
    run(&registers, COMPUTE, base, base, PAGES * PAGE)?;
    for page in 0..result.count() {
        let place = base + (page * PAGE) as u64;
        run(&registers, TO_MEMORY, place, result.address(page)?, PAGE)?;
    }
    let expected = |index: usize| pattern(index).wrapping_mul(3).wrapping_add(7);
    if let Some(index) = (0..words).find(|index| result.read(*index) != expected(*index)) {
        return Err(format!("word {index} is {:#x} instead of {:#x}", result.read(index), expected(index)));
    }
    let counted = Counted::find()?;
    counted.with_msix(function, VECTOR.into(), || {
        let command = TO_MEMORY | u32::from(VECTOR) << 8;
        counted.expect("MSI-X", || run(&registers, command, base, result.address(0)?, PAGE))
    })?;
    let resets = registers.read(RESETS);
    fs::write(function.file("reset"), "1").map_err(|error| format!("it cannot be reset: {error}"))?;
    let after = registers.read(RESETS);
    if after <= resets || registers.read_64(LENGTH) != 0 {
        return Err(format!("{resets} resets before, {after} after one"));
    }
    Ok(format!(
        "video memory of {} MiB at {first:#x} ({kind}) to its end, {PAGES} pages there, computed and back, MSI-X, reset",
        size >> 20
    ))
}

/// Writes and reads the last bytes, through a mapping that combines writes where the guest offers one; tells which memory
/// type the guest gave it.
fn end_of_video_memory(function: &Function, size: u64) -> Outcome {
    let combined = function.file("resource1_wc").exists();
    let name = if combined { "resource1_wc" } else { "resource1" };
    let video = function.map(name, size - PAGE as u64, PAGE)?;
    video.write_64(PAGE - 8, 0x0123_4567_89ab_cdef);
    let seen = video.read_64(PAGE - 8);
    if seen != 0x0123_4567_89ab_cdef {
        return Err(format!("the last bytes of the video memory are {seen:#x}"));
    }
    let (first, _) = function.resource(1).ok_or("it has no BAR 1")?;
    let list = fs::read_to_string("/sys/kernel/debug/x86/pat_memtype_list").unwrap_or_default();
    let start = format!("{:#018x}-", first + size - PAGE as u64);
    let line = list.lines().find(|line| line.contains(&start)).map(|line| line.trim().to_owned());
    Ok(line.unwrap_or_else(|| name.to_owned()))
}

fn pattern(index: usize) -> u32 {
    u32::try_from(index).unwrap_or_default().wrapping_mul(0x85eb_ca6b) ^ 0xa5a5_0000
}

/// Moves 256 MiB into the video memory and back to where they were cleared meanwhile; the device's sum over what it moved
/// is the one over what is there.
pub(crate) fn move_much(function: &Function) -> Outcome {
    function.enable().map_err(|error| error.to_string())?;
    let registers = function.map("resource0", 0, 16 << 20)?;
    let mut pages = HugePages::new(MUCH / HUGE_PAGE)?;
    pages.words().iter_mut().enumerate().for_each(|(index, word)| *word = pattern(index));
    let sum = checksum(pages.words());
    let mut addresses = Vec::new();
    for page in 0..pages.count() {
        addresses.push(pages.address(page)?);
    }
    let place = |page: usize| (page * HUGE_PAGE) as u64;
    for (page, address) in addresses.iter().enumerate() {
        run(&registers, TO_VIDEO, *address, place(page), HUGE_PAGE)?;
    }
    run(&registers, SUM, 0, 0, MUCH)?;
    let there = registers.read_64(CHECKSUM);
    pages.words().fill(0);
    for (page, address) in addresses.iter().enumerate() {
        run(&registers, TO_MEMORY, place(page), *address, HUGE_PAGE)?;
    }
    let back = checksum(pages.words());
    if (there, back) == (sum, sum) {
        Ok(format!("{} MiB there and back, checksum {sum:#018x}", MUCH >> 20))
    } else {
        Err(format!("checksums: {sum:#x} before, {there:#x} in video memory, {back:#x} back"))
    }
}

/// Reads or writes a page at an address on the bus that the caller knows to be there or not: says what the device met.
pub(crate) fn access(function: &Function, address: u64, write: bool) -> Outcome {
    function.enable().map_err(|error| error.to_string())?;
    let registers = function.map("resource0", 0, 16 << 20)?;
    let result =
        if write { run(&registers, TO_MEMORY, 0, address, PAGE) } else { run(&registers, TO_VIDEO, address, 0, PAGE) };
    if result.is_ok() {
        return Ok("reached".to_owned());
    }
    let (error, place) = (registers.read(STATUS) >> 8 & 0xff, registers.read_64(FAULT_ADDRESS));
    if error == BUS_ADDRESS { Ok(format!("fault at {place:#x}")) } else { Err(format!("error {error}")) }
}

/// The sum that the device makes (package `gpu-model`, `registers::checksum`).
fn checksum(words: &[u32]) -> u64 {
    const PRIME: u64 = 0x0100_0000_01b3;
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ u64::from(*word)).wrapping_mul(PRIME))
}

/// `command` is an operation, and in bits 8 to 15 the vector by which its end interrupts.
fn run(registers: &Registers, command: u32, source: u64, destination: u64, length: usize) -> Result<(), String> {
    registers.write_64(SOURCE, source);
    registers.write_64(DESTINATION, destination);
    registers.write_64(LENGTH, length as u64);
    registers.write(COMMAND, command);
    let ended = registers.wait(STATUS, |status| status & DONE != 0);
    match registers.read(STATUS) {
        status if ended && status >> 8 & 0xff == 0 => Ok(()),
        status => Err(format!("operation {command:#x} from {source:#x} to {destination:#x} ends with {status:#x}")),
    }
}
