//! QEMU's educational device: a factorial, a DMA engine with a buffer of one page, and an interrupt. Source: QEMU's `docs/specs/edu.rst`.

use std::fs::File;
use std::io::{Read, Write};

use crate::Outcome;
use crate::interrupt::Counted;
use crate::memory::{PAGE, Pages};
use crate::pci::{Function, Registers};

const IDENTIFICATION: usize = 0x00;
const LIVENESS: usize = 0x04;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const STATUS_COMPUTING: u32 = 1;
const RAISE: usize = 0x60;
const ACKNOWLEDGE: usize = 0x64;
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
        None => {
            interrupt(function, &registers)?;
            Ok("10! = 3628800, a page by DMA there and back, MSI".to_owned())
        }
    }
}

fn interrupt(function: &Function, registers: &Registers) -> Result<(), String> {
    let counted = Counted::find()?;
    counted.with_msi(function, || {
        counted.expect("MSI", || {
            registers.write(RAISE, 1);
            Ok(())
        })?;
        registers.write(ACKNOWLEDGE, 1);
        Ok(())
    })
}

/// Interrupts by its pin a few times: each is counted by the kernel's driver for devices whose drivers are programs,
/// `uio_pci_generic`, which masks the pin until it is told to go on.
pub(crate) fn interrupt_by_pin(function: &Function) -> Outcome {
    const TIMES: u32 = 5;
    const INTERRUPT_DISABLE: u16 = 1 << 10;
    const COMMAND: u64 = 4;
    let explain = |error: std::io::Error| format!("the kernel's driver for programs: {error}");
    let path = function.uio()?;
    let mut events = File::options().read(true).write(true).open(&path).map_err(explain)?;
    let registers = function.map("resource0", 0, 1 << 20)?;
    let unmask = || {
        let command = function.config_16(COMMAND).ok_or("it does not answer")?;
        function.set_config(COMMAND, &(command & !INTERRUPT_DISABLE).to_le_bytes()).map_err(explain)
    };
    let mut counts = Vec::new();
    for _ in 0..TIMES {
        unmask()?;
        registers.write(RAISE, 1);
        let mut count = [0; 4];
        events.read_exact(&mut count).map_err(explain)?;
        counts.push(u32::from_le_bytes(count));
        registers.write(ACKNOWLEDGE, 1);
    }
    events.flush().map_err(explain)?;
    let expected: Vec<u32> = (1..=TIMES).map(|time| counts[0] + time - 1).collect();
    if counts == expected {
        Ok(format!("{TIMES} interrupts by its pin"))
    } else {
        Err(format!("the interrupts were counted {counts:?}"))
    }
}

/// Moves a page of this machine's memory to an address on the bus and reads it back from there.
pub(crate) fn copy_through(function: &Function, address: u64) -> Outcome {
    function.enable().map_err(|error| error.to_string())?;
    let registers = function.map("resource0", 0, 1 << 20)?;
    let pages = Pages::new(2)?;
    let words = PAGE / 4;
    (0..words).for_each(|index| pages.write(index, !pattern(index)));
    for (source, destination, direction) in [
        (pages.address(0)?, BUFFER, 0),
        (BUFFER, address, DMA_TO_MEMORY),
        (pages.address(1)?, BUFFER, 0),
        (address, BUFFER, 0),
        (BUFFER, pages.address(1)?, DMA_TO_MEMORY),
    ] {
        copy(&registers, source, destination, direction)?;
    }
    let same = (0..words).all(|index| pages.read(words + index) == !pattern(index));
    Ok(if same { "reached" } else { "not reached" }.to_owned())
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
