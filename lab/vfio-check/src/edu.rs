//! Checks of QEMU's teaching device (QEMU's `docs/specs/edu.rst`).

use anyhow::{Result, ensure};

use crate::device::{Device, Interrupt};
use crate::report::Report;

const ID: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const RAISE_AFTER_FACTORIAL: u32 = 0x80;
const INTERRUPT_STATUS: u64 = 0x24;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
/// Where the device's own buffer of 4096 bytes lies.
const BUFFER: u64 = 0x4_0000;
const START: u64 = 1;
const TO_MEMORY: u64 = 1 << 1;
const RAISE_AFTER_DMA: u64 = 1 << 2;

const ADDRESS: u64 = 0x10_0000;
const LENGTH: usize = 4000;

/// Checks all that the device has.
pub(crate) fn check(device: &Device, report: &mut Report) -> Result<()> {
    report.check("registers", || registers(device))?;
    let interrupt = device.msi()?;
    report.check("10! and MSI", || factorial(device, &interrupt))?;
    report.check("DMA both ways, MSI", || copies(device, &interrupt))
}

fn registers(device: &Device) -> Result<()> {
    let id = device.read_u32(ID);
    ensure!(id & 0xff == 0xed, "ID reads {id:#x}");
    device.write_u32(LIVENESS, 0x1234_5678);
    let answer = device.read_u32(LIVENESS);
    ensure!(answer == !0x1234_5678, "it answers {answer:#x}");
    Ok(())
}

fn acknowledge(device: &Device, interrupt: &Interrupt) -> Result<()> {
    interrupt.wait()?;
    device.write_u32(INTERRUPT_ACKNOWLEDGE, device.read_u32(INTERRUPT_STATUS));
    Ok(())
}

fn factorial(device: &Device, interrupt: &Interrupt) -> Result<()> {
    device.write_u32(STATUS, RAISE_AFTER_FACTORIAL);
    device.write_u32(FACTORIAL, 10);
    acknowledge(device, interrupt)?;
    let result = device.read_u32(FACTORIAL);
    ensure!(result == 3_628_800, "10! is {result}");
    Ok(())
}

fn copies(device: &Device, interrupt: &Interrupt) -> Result<()> {
    let mapped = device.map(ADDRESS, 2 << 20)?;
    let data = crate::noise(LENGTH);
    mapped.memory.write(0, &data)?;
    let back = 0x1000;
    for (source, destination, direction) in [(ADDRESS, BUFFER, 0), (BUFFER, ADDRESS + back, TO_MEMORY)] {
        device.write_u64(DMA_SOURCE, source);
        device.write_u64(DMA_DESTINATION, destination);
        device.write_u64(DMA_COUNT, LENGTH as u64);
        device.write_u64(DMA_COMMAND, START | direction | RAISE_AFTER_DMA);
        acknowledge(device, interrupt)?;
    }
    ensure!(mapped.memory.read(usize::try_from(back)?, LENGTH)? == data, "something else came back");
    Ok(())
}
