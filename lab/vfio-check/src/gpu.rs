//! Checks of the GPU model, by its registers (see the documentation of the crate `gpu_model`).

use anyhow::{Result, ensure};
use gpu_model::registers::{self, CommandError, DONE, Operation, checksum};

use crate::device::{Device, Interrupt};
use crate::report::Report;

/// Bytes that the engine can reach, and where.
const MEMORY: usize = 64 << 20;
const ADDRESS: u64 = 1 << 30;
/// What is copied: half of the memory, but for an end that is no multiple of anything.
const LENGTH: usize = (MEMORY >> 1) - 13;
const PAGE: usize = 4096;
const VECTOR: u8 = 3;

struct Engine<'a> {
    device: &'a Device,
    interrupt: Interrupt,
}

impl Engine<'_> {
    /// Runs a command to its interrupt; answers its status.
    fn run(&self, operation: Operation, source: u64, destination: u64, length: u64) -> Result<u32> {
        self.device.write_u64(registers::SOURCE, source);
        self.device.write_u64(registers::DESTINATION, destination);
        self.device.write_u64(registers::LENGTH, length);
        self.device.write_u32(registers::COMMAND, operation as u32 | u32::from(VECTOR) << 8);
        self.interrupt.wait()?;
        Ok(self.device.read_u32(registers::STATUS))
    }

    fn checksum(&self) -> u64 {
        self.device.read_u64(registers::CHECKSUM)
    }
}

/// Checks all that the model has.
pub(crate) fn check(device: &Device, report: &mut Report) -> Result<()> {
    report.check("registers", || registers(device))?;
    let engine = Engine { device, interrupt: device.msix(VECTOR.into())? };
    report.check("last bytes of BAR1", || last_bytes(&engine))?;
    let mapped = report.check("map 64 MiB for DMA", || device.map(ADDRESS, MEMORY))?;
    report.check("DMA both ways, MSI-X", || copies(&engine, &mapped.memory))?;
    report.check("computation", || computes(&engine))?;
    report.check("unmap 64 MiB", || {
        drop(mapped);
        Ok(())
    })?;
    report.check("late DMA faults", || faults(&engine))?;
    report.check("reset", || resets(device))
}

fn registers(device: &Device) -> Result<()> {
    let (id, size) = (device.read_u32(registers::ID), device.read_u64(registers::VIDEO_MEMORY_SIZE));
    ensure!(id == registers::ID_VALUE, "ID reads {id:#x}");
    let (bar1, mappable) = device.region(1);
    ensure!(bar1 == size && mappable, "BAR1 has {bar1:#x} bytes, the register says {size:#x}");
    ensure!(device.region(0).0 == gpu_model::BAR0_SIZE && device.region(3).0 == gpu_model::BAR3_SIZE, "other sizes");
    let vectors = device.interrupts().1;
    ensure!(vectors == u32::from(gpu_model::VECTORS), "{vectors} vectors");
    device.write_u32(registers::SCRATCH, 0xabcd_1234);
    ensure!(device.read_u32(registers::SCRATCH) == 0xabcd_1234, "SCRATCH keeps nothing");
    Ok(())
}

fn last_bytes(engine: &Engine<'_>) -> Result<()> {
    let bar = engine.device.end_of_bar(1, PAGE)?;
    bar.write(PAGE - 16, b"the last of them")?;
    let end = engine.device.region(1).0;
    ensure!(engine.run(Operation::Checksum, end - 16, 0, 16)? == DONE, "the engine cannot read them");
    ensure!(engine.checksum() == checksum(b"the last of them"), "the engine reads something else");
    ensure!(bar.read(PAGE - 16, 16)? == b"the last of them", "they read back as something else");
    Ok(())
}

fn copies(engine: &Engine<'_>, memory: &crate::memory::Shared) -> Result<()> {
    let data = crate::noise(LENGTH);
    memory.write(0, &data)?;
    let (length, half) = (LENGTH as u64, MEMORY as u64 / 2);
    let status = engine.run(Operation::CopyIn, ADDRESS, 77, length)?;
    ensure!(status == DONE, "copying in ends with {status:#x}");
    ensure!(engine.checksum() == checksum(&data), "something else came in");
    let status = engine.run(Operation::CopyOut, 77, ADDRESS + half, length)?;
    ensure!(status == DONE, "copying out ends with {status:#x}");
    ensure!(memory.read(MEMORY / 2, LENGTH)? == data, "something else came out");
    Ok(())
}

fn computes(engine: &Engine<'_>) -> Result<()> {
    const LENGTH: usize = 4 << 20;
    engine.device.write_u32(registers::MULTIPLIER, 1_664_525);
    engine.device.write_u32(registers::ADDEND, 1_013_904_223);
    let data = engine.device.end_of_bar(1, LENGTH)?;
    let words = crate::noise(LENGTH);
    data.write(0, &words)?;
    let start = engine.device.region(1).0 - LENGTH as u64;
    let status = engine.run(Operation::Compute, start, start, LENGTH as u64)?;
    ensure!(status == DONE, "it ends with {status:#x}");
    let step = |word: &[u8; 4]| u32::from_le_bytes(*word).wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let expected: Vec<u8> = words.as_chunks::<4>().0.iter().flat_map(|word| step(word).to_le_bytes()).collect();
    ensure!(engine.checksum() == checksum(&expected), "the checksum differs");
    ensure!(data.read(0, LENGTH)? == expected, "the result differs");
    Ok(())
}

/// The memory has been taken away: the command must end with a fault where it began.
fn faults(engine: &Engine<'_>) -> Result<()> {
    let status = engine.run(Operation::CopyOut, 0, ADDRESS, 4096)?;
    ensure!(status == DONE | (CommandError::BusAddress as u32) << 8, "it ends with {status:#x}");
    let fault = engine.device.read_u64(registers::FAULT_ADDRESS);
    ensure!(fault == ADDRESS, "it faults at {fault:#x}");
    Ok(())
}

fn resets(device: &Device) -> Result<()> {
    let before = device.read_u32(registers::RESETS);
    device.write_u32(registers::SCRATCH, 1);
    device.end_of_bar(1, PAGE)?.write(0, b"secret")?;
    device.reset();
    device.enable();
    ensure!(device.read_u32(registers::RESETS) > before, "the device was not reset");
    ensure!(device.read_u32(registers::SCRATCH) == 0, "SCRATCH survives");
    ensure!(device.end_of_bar(1, PAGE)?.read(0, 6)? == [0; 6], "video memory survives");
    Ok(())
}
