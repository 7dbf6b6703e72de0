//! `dragonball ctl`: changes a running machine by its control socket.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use dragonball::control_socket::{ControlAnswer, ControlError, ControlRequest, ask};
use dragonball::manage::{DeviceInfo, MachineInfo, Presence, RangeInfo};
use dragonball::{DeviceConfig, DiskConfig, FsConfig, NetConfig, PmemConfig, VfioConfig};

use crate::cli::{Image, parse_fs, parse_image, parse_net, parse_size, parse_vfio};
use crate::mtrr;

const EXAMPLES: &str = "\
Examples:
  dragonball run --kernel vmlinux --initrd initrd.cpio --control /run/vm.sock --max-cpus 8 &
  dragonball ctl /run/vm.sock add-disk data.img --name data
  dragonball ctl /run/vm.sock resize-cpu 4        (then, in the guest: echo 1 > /sys/devices/system/cpu/cpu1/online …)
  dragonball ctl /run/vm.sock info
  dragonball ctl /run/vm.sock remove data";

/// A running machine, and what to do with it.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Ctl {
    /// The machine's control socket (its --control).
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,

    /// Print the answer as JSON.
    #[arg(long, global = true)]
    json: bool,

    /// How long the guest gets to take a device or to let one go.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,

    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Adds a file or block device as a disk.
    AddDisk {
        /// The file, with ",ro" appended to refuse writes.
        #[arg(value_name = "FILE[,ro]", value_parser = parse_image)]
        image: Image,
        /// The device's name, for info and remove.
        #[arg(long)]
        name: Option<String>,
    },
    /// Adds a file as persistent memory; the file does not change.
    AddPmem {
        /// The file, with ",ro" appended to refuse writes.
        #[arg(value_name = "FILE[,ro]", value_parser = parse_image)]
        image: Image,
        /// The device's name, for info and remove.
        #[arg(long)]
        name: Option<String>,
    },
    /// Adds a network card on a tap interface, which is made if it is not there.
    AddNet {
        /// The interface and the card.
        #[arg(value_name = "tap=NAME[,mac=ADDRESS][,mtu=BYTES][,queues=N][,vhost=auto|on|off]", value_parser = parse_net)]
        net: NetConfig,
        /// The device's name, for info and remove.
        #[arg(long)]
        name: Option<String>,
    },
    /// Adds a directory that the guest can mount by a tag.
    AddFs {
        /// The tag and the directory.
        #[arg(value_name = "TAG=DIR", value_parser = parse_fs)]
        fs: FsConfig,
        /// The device's name, for info and remove.
        #[arg(long)]
        name: Option<String>,
    },
    /// Adds a device of the host with all of its IOMMU group, which must be bound to vfio-pci.
    AddVfio {
        /// Its directory in sysfs, its address, or /dev/vfio/GROUP.
        #[arg(value_name = "DEVICE[,p2p][,clique=N]", value_parser = parse_vfio)]
        device: VfioConfig,
        /// The device's name, for info and remove.
        #[arg(long)]
        name: Option<String>,
    },
    /// Removes a device, when the guest has let it go.
    Remove {
        /// Its name.
        name: String,
    },
    /// Adds or removes vCPUs until there are this many.
    ResizeCpu {
        /// How many.
        count: u8,
    },
    /// Gives the guest memory or takes some until it has this much.
    ResizeMem {
        /// How much; in MiB, or with a suffix (512M, 4G).
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Asks the guest to give this much memory back by its balloon.
    Balloon {
        /// How much; in MiB, or with a suffix (512M, 4G).
        #[arg(value_parser = parse_size)]
        size: u64,
    },
    /// Presses the power button.
    PowerButton,
    /// Lets the vCPUs stand still.
    Pause,
    /// Lets them run again.
    Resume,
    /// Shows what the machine consists of.
    Info,
    /// Shows the memory types (MTRR) of the vCPUs, and of RAM, windows and BARs by them.
    Mtrr,
}

/// Does it, and prints the answer.
///
/// # Errors
/// When there is no machine, or it refused.
pub(crate) fn run(ctl: Ctl) -> Result<(), ControlError> {
    let answer = ask(&ctl.socket, &request(ctl.action, ctl.timeout.saturating_mul(1000)))?;
    if ctl.json {
        let text = serde_json::to_string_pretty(&answer).map_err(|error| ControlError::Broken(error.into()))?;
        println!("{text}");
    } else {
        print(&answer);
    }
    Ok(())
}

fn request(action: Action, deadline_ms: u32) -> ControlRequest {
    let add = |name, device| ControlRequest::AddDevice { name, device, deadline_ms };
    match action {
        Action::AddDisk { image: Image { path, read_only }, name } => {
            add(name, DeviceConfig::Blk(DiskConfig { path: absolute(path), read_only }))
        }
        Action::AddPmem { image: Image { path, read_only }, name } => {
            add(name, DeviceConfig::Pmem(PmemConfig { path: absolute(path), read_only }))
        }
        Action::AddNet { net, name } => add(name, DeviceConfig::Net(net)),
        Action::AddFs { fs, name } => add(name, DeviceConfig::Fs(FsConfig { directory: absolute(fs.directory), ..fs })),
        Action::AddVfio { device, name } => add(name, DeviceConfig::Vfio(device)),
        Action::Remove { name } => ControlRequest::RemoveDevice { name, deadline_ms },
        Action::ResizeCpu { count } => ControlRequest::ResizeVcpus { count, deadline_ms },
        Action::ResizeMem { size } => ControlRequest::ResizeMemory { bytes: size, deadline_ms },
        Action::Balloon { size } => ControlRequest::Balloon { bytes: size, deadline_ms },
        Action::PowerButton => ControlRequest::PowerButton {},
        Action::Pause => ControlRequest::Pause {},
        Action::Resume => ControlRequest::Resume {},
        Action::Info => ControlRequest::Info {},
        Action::Mtrr => ControlRequest::MemoryTypes {},
    }
}

/// The machine's working directory may be another one.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn print(answer: &ControlAnswer) {
    match answer {
        ControlAnswer::Done => {}
        ControlAnswer::Device(device) => println!("{} at {}", device.name, device.address),
        ControlAnswer::Vcpus(count) => {
            println!("{} vCPUs of at most {}", count.present, count.max);
            if count.present != count.asked {
                eprintln!("The guest did not follow in time: {} were asked for", count.asked);
            }
        }
        ControlAnswer::Memory(memory) => {
            println!("{} of memory, of at most {}", size(memory.present), size(memory.max));
            if memory.present != memory.asked {
                eprintln!("The guest did not follow in time: {} were asked for", size(memory.asked));
            }
        }
        ControlAnswer::Balloon(balloon) => {
            println!("{} given back", size(balloon.actual));
            if balloon.actual != balloon.target {
                eprintln!("The guest did not follow in time: {} were asked for", size(balloon.target));
            }
        }
        ControlAnswer::Machine(machine) => print!("{}", tree(machine, std::io::stdout().is_terminal())),
        ControlAnswer::MemoryTypes(types) => print!("{}", mtrr::table(types)),
    }
}

/// The machine as a tree.
fn tree(machine: &MachineInfo, colour: bool) -> String {
    let bold = |text: &str| if colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() };
    let mut lines = vec![bold("machine")];
    let (vcpus, memory) = (machine.vcpus, machine.memory);
    lines.push(format!("├─ vCPUs: {} of at most {}", vcpus.present, vcpus.max));
    lines.push(format!("├─ RAM: {} of at most {}", size(memory.present), size(memory.max)));
    if let Some(balloon) = machine.balloon {
        lines.push(format!("├─ balloon: {} given back", size(balloon.actual)));
    }
    lines.push(format!("├─ hot-plug: {}", if machine.hot_plug { "yes" } else { "no" }));
    lines.push("├─ memory map".to_owned());
    lines.extend(branches(&machine.map, "│  "));
    lines.push("└─ PCI bus 0".to_owned());
    let last = machine.devices.len().saturating_sub(1);
    for (index, device) in machine.devices.iter().enumerate() {
        let (twig, indent) = if index == last { ("└─", "      ") } else { ("├─", "   │  ") };
        lines.push(format!("   {twig} {}", title(device, &bold(&device.name))));
        lines.extend(branches(&device.ranges, indent));
    }
    lines.join("\n") + "\n"
}

fn title(device: &DeviceInfo, name: &str) -> String {
    let presence = match device.presence {
        Presence::Present => "",
        Presence::Announced => ", announced to the guest",
        Presence::Leaving => ", the guest is asked to let it go",
    };
    let interrupts = match device.interrupts.len() {
        0 => String::new(),
        1 => ", 1 interrupt".to_owned(),
        count => format!(", {count} interrupts"),
    };
    format!("{} {name} ({}{interrupts}{presence})", device.address, device.kind)
}

fn branches(ranges: &[RangeInfo], indent: &str) -> Vec<String> {
    let last = ranges.len().saturating_sub(1);
    let line = |(index, range): (usize, &RangeInfo)| {
        let twig = if index == last { "└─" } else { "├─" };
        let end = range.start + range.length.saturating_sub(1);
        format!("{indent}{twig} {:#014x} – {end:#014x}  {} ({})", range.start, range.what, size(range.length))
    };
    ranges.iter().enumerate().map(line).collect()
}

/// A length in the largest unit that gives a whole number.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = |shift: &u32| bytes.is_multiple_of(1 << shift) && bytes > 0;
    units
        .iter()
        .find(|(shift, _)| fits(shift))
        .map_or_else(|| format!("{bytes} bytes"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use dragonball::manage::{BalloonSize, MemorySize, VcpuCount};

    use super::*;

    #[test]
    fn the_tree_names_everything_once() {
        let range = |start, length, what: &str| RangeInfo { start, length, what: what.to_owned() };
        let device = |name: &str, slot, ranges| DeviceInfo {
            name: name.to_owned(),
            kind: "blk".to_owned(),
            address: format!("0000:00:{slot:02x}.0"),
            slot,
            presence: Presence::Present,
            ranges,
            interrupts: vec![24, 25],
            times: None,
        };
        let machine = MachineInfo {
            vcpus: VcpuCount { asked: 1, present: 1, max: 8 },
            memory: MemorySize { boot: 128 << 20, asked: 256 << 20, present: 256 << 20, max: 1 << 30 },
            balloon: Some(BalloonSize { target: 0, actual: 8192, discarded: 8192, available: None }),
            hot_plug: true,
            map: vec![range(0, 128 << 20, "RAM"), range(0xc000_1000, 4096, "registers")],
            devices: vec![device("rng0", 1, vec![]), device("data", 10, vec![range(0xc010_0000, 0x4000, "BAR0")])],
        };
        let expected = "\
machine
├─ vCPUs: 1 of at most 8
├─ RAM: 256 MiB of at most 1 GiB
├─ balloon: 8 KiB given back
├─ hot-plug: yes
├─ memory map
│  ├─ 0x000000000000 – 0x000007ffffff  RAM (128 MiB)
│  └─ 0x0000c0001000 – 0x0000c0001fff  registers (4 KiB)
└─ PCI bus 0
   ├─ 0000:00:01.0 rng0 (blk, 2 interrupts)
   └─ 0000:00:0a.0 data (blk, 2 interrupts)
      └─ 0x0000c0100000 – 0x0000c0103fff  BAR0 (16 KiB)
";
        assert_eq!(tree(&machine, false), expected);
    }
}
