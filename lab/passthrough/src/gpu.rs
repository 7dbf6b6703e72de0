//! The lab's GPU model: registers, video memory to its last byte, copies both ways, a computation, and a reset. Its
//! registers are listed in the documentation of the package `gpu-model`.

use std::fs;

use crate::Outcome;
use crate::memory::{PAGE, Pages};
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
const RESETS: usize = 0x104c;
const TO_VIDEO: u32 = 1;
const TO_MEMORY: u32 = 2;
const COMPUTE: u32 = 3;

/// Pages that are moved.
const PAGES: usize = 256;

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
    let resets = registers.read(RESETS);
    fs::write(function.file("reset"), "1").map_err(|error| format!("it cannot be reset: {error}"))?;
    let after = registers.read(RESETS);
    if after <= resets || registers.read_64(LENGTH) != 0 {
        return Err(format!("{resets} resets before, {after} after one"));
    }
    Ok(format!(
        "video memory of {} MiB at {first:#x} ({kind}) to its end, {PAGES} pages there, computed and back, reset",
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

fn run(registers: &Registers, operation: u32, source: u64, destination: u64, length: usize) -> Result<(), String> {
    registers.write_64(SOURCE, source);
    registers.write_64(DESTINATION, destination);
    registers.write_64(LENGTH, length as u64);
    registers.write(COMMAND, operation);
    let ended = registers.wait(STATUS, |status| status & DONE != 0);
    match registers.read(STATUS) {
        status if ended && status >> 8 & 0xff == 0 => Ok(()),
        status => Err(format!("operation {operation} from {source:#x} to {destination:#x} ends with {status:#x}")),
    }
}
