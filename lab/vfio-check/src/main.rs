//! The `vfio-check` command: takes devices from their drivers and drives them by VFIO.

mod device;
mod edu;
mod gpu;
mod memory;
mod report;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::device::{Device, Way, attribute, bind, group};
use crate::report::Report;

/// Drives PCI devices by VFIO and checks what they answer: regions and interrupts of all, and what is special of edu,
/// ivshmem, QEMU's test device and the GPU model. Ends with 1 at the first check that fails.
#[derive(Debug, Parser)]
#[command(name = "vfio-check", version, after_help = "Example:\n  vfio-check 0000:01:00.0 0000:02:00.0 --by iommufd")]
struct Arguments {
    /// PCI addresses; all of a device's IOMMU group are taken from their drivers
    #[arg(required = true, value_name = "ADDRESS")]
    devices: Vec<String>,
    /// How the devices are opened
    #[arg(long, value_enum, default_value_t = Way::Group)]
    by: Way,
}

const PAGE: usize = 4096;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    for address in &arguments.devices {
        if let Err(error) = check(address, arguments.by) {
            eprintln!("vfio-check: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Checks all devices of a group, opened at once in one address space.
fn check(address: &str, way: Way) -> Result<()> {
    let members = group(address)?;
    Report::new(address).note(&format!("group of {}: {}", members.len(), members.join(" ")));
    for member in &members {
        bind(member)?;
    }
    let addresses: Vec<&str> = members.iter().map(String::as_str).collect();
    let devices = Device::open(&addresses, way)?;
    for (member, device) in members.iter().zip(&devices) {
        check_one(member, device)?;
    }
    Ok(())
}

fn check_one(address: &str, device: &Device) -> Result<()> {
    let mut report = Report::new(address);
    let (vendor, model) = (attribute(address, "vendor")?, attribute(address, "device")?);
    describe(device, &report, vendor, model, attribute(address, "class")?);
    device.reset();
    device.enable();
    match (vendor, model) {
        (0x10de, 0x20b0) => gpu::check(device, &mut report),
        (0x1234, 0x11e8) => edu::check(device, &mut report),
        (0x1af4, 0x1110) => report.check("last bytes of BAR2", || last_bytes(device, 2)),
        (0x1b36, 0x0005) => report.check("BAR2 can be mapped to its end", || {
            let (size, mappable) = device.region(2);
            ensure!(size >= 1 << 30 && mappable, "it has {size:#x} bytes");
            device.end_of_bar(2, PAGE).map(drop)
        }),
        _ => Ok(()),
    }
}

fn describe(device: &Device, report: &Report, vendor: u32, model: u32, class: u32) {
    let regions: Vec<String> = (0..6)
        .filter(|index| device.region(*index).0 > 0)
        .map(|index| {
            let (size, mappable) = device.region(index);
            format!("BAR{index} {size:#x}{}", if mappable { " (mappable)" } else { "" })
        })
        .collect();
    let (msi, msix) = device.interrupts();
    report
        .note(&format!("{vendor:04x}:{model:04x} class {class:06x}, MSI {msi}, MSI-X {msix}, {}", regions.join(", ")));
}

fn last_bytes(device: &Device, bar: u32) -> Result<()> {
    let end = device.end_of_bar(bar, PAGE)?;
    end.write(PAGE - 16, b"the last of them")?;
    ensure!(device.end_of_bar(bar, PAGE)?.read(PAGE - 16, 16)? == b"the last of them", "something else reads back");
    Ok(())
}

/// Bytes that differ everywhere, the same in each run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(step).flatten().take(length).collect()
}
