//! QEMU's educational device: a factorial, and a DMA engine with a buffer of one page. Source: QEMU's `docs/specs/edu.rst`.

use crate::Outcome;
use crate::memory::{PAGE, Pages};
use crate::pci::{Function, Registers};

const IDENTIFICATION: usize = 0x00;
const LIVENESS: usize = 0x04;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const STATUS_COMPUTING: u32 = 1;
const DMA_SOURCE: usize = 0x80;
const DMA_DESTINATION: usize = 0x88;
const DMA_COUNT: usize = 0x90;
const DMA_COMMAND: usize = 0x98;
const DMA_START: u32 = 1;
const DMA_TO_MEMORY: u32 = 2;
/// Where its buffer is, as its engine sees it.
const BUFFER: u64 = 0x4_0000;

/// Computes 10! and moves a page to the device and back to another page.
pub(crate) fn check(function: &Function) -> Outcome {
    function.enable().map_err(|error| error.to_string())?;
    let registers = function.map("resource0", 0, 1 << 20)?;
    let id = registers.read(IDENTIFICATION);
    registers.write(LIVENESS, 0x1234_5678);
    let inverse = registers.read(LIVENESS);
    if id & 0xff != 0xed || inverse != !0x1234_5678 {
        return Err(format!("it answers {id:#x} and {inverse:#x}"));
    }
    registers.write(FACTORIAL, 10);
    let computed = registers.wait(STATUS, |status| status & STATUS_COMPUTING == 0);
    let factorial = registers.read(FACTORIAL);
    if !computed || factorial != 3_628_800 {
        return Err(format!("10! is {factorial}"));
    }
    let pages = Pages::new(2)?;
    let words = PAGE / 4;
    (0..words).for_each(|index| pages.write(index, pattern(index)));
    copy(&registers, pages.address(0)?, BUFFER, 0)?;
    copy(&registers, BUFFER, pages.address(1)?, DMA_TO_MEMORY)?;
    match (0..words).find(|index| pages.read(words + index) != pattern(*index)) {
        Some(index) => Err(format!("word {index} of the page is {:#x} after DMA", pages.read(words + index))),
        None => Ok("10! = 3628800, a page by DMA there and back".to_owned()),
    }
}

fn pattern(index: usize) -> u32 {
    u32::try_from(index).unwrap_or_default().wrapping_mul(0x9e37_79b1) ^ 0x5555
}

fn copy(registers: &Registers, source: u64, destination: u64, direction: u32) -> Result<(), String> {
    registers.write_64(DMA_SOURCE, source);
    registers.write_64(DMA_DESTINATION, destination);
    registers.write_64(DMA_COUNT, PAGE as u64);
    registers.write(DMA_COMMAND, DMA_START | direction);
    if registers.wait(DMA_COMMAND, |command| command & DMA_START == 0) {
        Ok(())
    } else {
        Err(format!("DMA from {source:#x} to {destination:#x} does not end"))
    }
}
