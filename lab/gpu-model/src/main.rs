//! The `gpu-model` command: serves a device on a socket.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use gpu_model::{Device, Identity};

/// A model of a datacenter GPU, served by vfio-user to QEMU 10.1 or newer.
#[derive(Debug, Parser)]
#[command(
    name = "gpu-model",
    version,
    after_help = "Example:\n  gpu-model /tmp/gpu.sock --memory 8G &\n  qemu-system-x86_64 … -device \
    '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"/tmp/gpu.sock\"}}'\n\n\
    QEMU's memory must be shared (a memory backend with share=on), or the device cannot reach it."
)]
struct Arguments {
    /// Where to listen; not needed when standard input is a listening socket
    #[arg(required_unless_present = "inherited")]
    socket: Option<PathBuf>,
    /// Listen on the socket that is standard input, and end when the pipe that is standard output loses its reader
    #[arg(long, conflicts_with = "socket")]
    inherited: bool,
    /// Video memory: a power of two from 1M to 1T
    #[arg(long, default_value = "8G", value_parser = size)]
    memory: u64,
    /// PCI vendor, hexadecimal
    #[arg(long, value_parser = hexadecimal::<u16>, default_value = "10de")]
    vendor: u16,
    /// PCI device, hexadecimal
    #[arg(long, value_parser = hexadecimal::<u16>, default_value = "20b0")]
    device: u16,
    /// PCI class, subclass and programming interface, hexadecimal
    #[arg(long, value_parser = hexadecimal::<u32>, default_value = "030200")]
    class: u32,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let identity = Identity { vendor: arguments.vendor, device: arguments.device, class: arguments.class };
    let device = Device::new(identity, arguments.memory)?;
    match &arguments.socket {
        Some(path) => {
            let listener = UnixListener::bind(path)
                .with_context(|| format!("Cannot listen on {}; remove it if nobody uses it", path.display()))?;
            gpu_model::serve(&listener, &device, None)?;
        }
        None => {
            let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
            gpu_model::serve(&listener, &device, Some(io::stdout().as_fd()))?;
        }
    }
    Ok(())
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((end, 'M')) => (&text[..end], 20),
        Some((end, 'G')) => (&text[..end], 30),
        Some((end, 'T')) => (&text[..end], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "give a number with M, G or T, as 8G".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is more than can be".to_owned())
}

fn hexadecimal<T: TryFrom<u32>>(text: &str) -> Result<T, String> {
    let number = u32::from_str_radix(text, 16).map_err(|_| "give hexadecimal digits".to_owned())?;
    T::try_from(number).map_err(|_| "that has too many digits".to_owned())
}
