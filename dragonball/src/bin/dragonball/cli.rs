//! The command line.

use std::path::PathBuf;

use crate::ctl::Ctl;
use clap::{Args, Parser, Subcommand};
use dragonball::{
    ConsoleOutput, DiskConfig, FsConfig, MachineConfig, NetConfig, PmemConfig, TapSource, VfioConfig, VhostMode,
    VsockConfig,
};

/// Runs virtual machines.
#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Boots a Linux kernel and waits for the machine's end.
    #[command(after_help = EXIT_STATUS)]
    Run(Box<Run>),
    /// Changes a running machine: devices and vCPUs come and go.
    Ctl(Ctl),
}

const EXAMPLES: &str = "\
Examples:
  A shell in an initial RAM disk, on this terminal (leave it by `poweroff -f`):
    dragonball run --kernel vmlinux --initrd initrd.cpio --console -

  A root file system as persistent memory, a disk, a shared directory (in the guest: mount -t virtiofs work /mnt):
    dragonball run --kernel vmlinux --cmdline 'root=/dev/pmem0 rootflags=dax ro' --pmem root.erofs \\
        --disk data.img --fs work=/srv/work --console -

  A network card on the tap interface tap0, which is made and set up if it is not there (then, on the host:
  ip address add 10.0.0.1/24 dev tap0):
    dragonball run --kernel vmlinux --initrd initrd.cpio --net tap=tap0 --console -

  A GPU of the host, which was bound to vfio-pci before:
    dragonball run --kernel vmlinux --initrd initrd.cpio --memory 2G --vfio 0000:01:00.0 --console -

  How long it takes until init has started:
    dragonball run --kernel vmlinux --initrd initrd.cpio --boot-timer";

const EXIT_STATUS: &str = "\
Exit status:
  0  the guest powered off
  1  the machine could not be started, or could not go on
  2  the command line is wrong
  3  the guest asked for a restart
  4  the guest's kernel panicked
  5  the guest met a triple fault
  6  the machine was stopped from outside (SIGINT, SIGTERM)

Sizes are in MiB or have a suffix: 128, 128M, 2G.

The machine's own part of the kernel command line comes first; --cmdline is appended to it. The environment variable
RUST_LOG sets what is logged to standard error (for instance RUST_LOG=debug).";

/// A machine to run.
#[derive(Args)]
pub(crate) struct Run {
    /// An uncompressed vmlinux with a PVH entry point, or a bzImage.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// An initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// More words for the kernel command line.
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    cmdline: String,

    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,

    /// The most vCPUs that the machine may get while it runs.
    #[arg(long, value_name = "N", requires = "control")]
    max_cpus: Option<u8>,

    /// Make a control socket here, for `dragonball ctl`: devices and vCPUs can come and go.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,

    /// Guest memory, a multiple of 2 MiB.
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_size)]
    memory: u64,

    /// The most memory that the guest can have while it runs, a multiple of 2 MiB; it starts with --memory.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_max: Option<u64>,

    /// Have guest memory in the host's huge pages from the start: the guest is faster, and gets devices of the host sooner,
    /// but takes more memory than it uses. Machines with --vfio have it so anyway.
    #[arg(long)]
    huge_pages: bool,

    /// Add a balloon, through which the guest gives memory back that it does not use: free pages by itself, others when it
    /// is asked to.
    #[arg(long)]
    balloon: bool,

    /// A file that the guest sees as persistent memory (/dev/pmem0 and on); it does not change. Can be repeated.
    #[arg(long, value_name = "FILE[,ro]", value_parser = parse_image)]
    pmem: Vec<Image>,

    /// A file or block device that the guest sees as a disk (/dev/vda and on). Can be repeated.
    #[arg(long, value_name = "FILE[,ro]", value_parser = parse_image)]
    disk: Vec<Image>,

    /// A network card (eth0 and on) on a tap interface, which is made if it is not there and goes away with the machine
    /// then. More queue pairs than one need an interface made with multi_queue. The host kernel moves the packets where it
    /// can (vhost=auto), must do so (on) or does not (off). Can be repeated.
    #[arg(
        long,
        value_name = "tap=NAME[,mac=ADDRESS][,mtu=BYTES][,queues=N][,vhost=auto|on|off]",
        value_parser = parse_net
    )]
    net: Vec<NetConfig>,

    /// A directory that the guest can mount by a tag. Can be repeated.
    #[arg(long, value_name = "TAG=DIR", value_parser = parse_fs)]
    fs: Vec<FsConfig>,

    /// The host side of the socket device: a unix socket made here.
    #[arg(long, value_name = "SOCKET")]
    vsock: Option<PathBuf>,

    /// The guest's context id on its socket device.
    #[arg(long, value_name = "CID", default_value_t = 3, requires = "vsock")]
    vsock_cid: u32,

    /// A device of the host that the guest gets, with all of its IOMMU group: its directory in sysfs, its address, or
    /// /dev/vfio/GROUP. All of them must be bound to vfio-pci. Guest memory stays in RAM for as long as it runs. With p2p,
    /// other devices may access its memory; clique=N tells NVIDIA's driver which devices may. Can be repeated.
    #[arg(long, value_name = "DEVICE[,p2p][,clique=N]", value_parser = parse_vfio)]
    vfio: Vec<VfioConfig>,

    /// Where the console goes: a file, or - for standard input and output.
    #[arg(long, value_name = "FILE|-", value_parser = parse_output)]
    console: Option<ConsoleOutput>,

    /// Where the output of a 16550 UART goes, as for --console. It is slow, but works from the kernel's first line on.
    #[arg(long, value_name = "FILE|-", value_parser = parse_output)]
    debug_uart: Option<ConsoleOutput>,

    /// Print the time from this command's request to the guest's init: a byte 123 at guest-physical address 0xc0000000.
    #[arg(long)]
    pub(crate) boot_timer: bool,

    /// Print when each step of the start happened, in microseconds from the first one.
    #[arg(long)]
    pub(crate) stamps: bool,
}

/// An image file of a device.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(digits_end);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{suffix:?} is no suffix of a size: use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| "give a number, for instance 128M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than 64 bits can hold"))
}

pub(crate) fn parse_image(text: &str) -> Result<Image, String> {
    let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
    if path.is_empty() { Err("give a file".to_owned()) } else { Ok(Image { path: path.into(), read_only }) }
}

pub(crate) fn parse_net(text: &str) -> Result<NetConfig, String> {
    const KEYS: &str = "use tap, mac, mtu, queues and vhost, each at most once";
    let (mut config, mut name, mut queues) = (NetConfig::new(""), None, 1);
    let mut seen = Vec::new();
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} has no value: {KEYS}"))?;
        if seen.contains(&key) {
            return Err(format!("{key} is given twice: {KEYS}"));
        }
        seen.push(key);
        let number = || value.parse().map_err(|_| format!("{value:?} is no number of 0 to 65535: correct {key}"));
        match key {
            "tap" => name = Some(value.to_owned()),
            "mac" => config.mac = Some(value.parse().map_err(|error| format!("{error}"))?),
            "mtu" => config.mtu = Some(number()?),
            "queues" => queues = number()?,
            "vhost" => config.vhost = parse_vhost(value)?,
            _ => return Err(format!("{key:?} is no part of a network card: {KEYS}")),
        }
    }
    let name = name.ok_or("name the tap interface, for instance tap=tap0")?;
    config.tap = TapSource::Name { name, queues };
    Ok(config)
}

fn parse_vhost(text: &str) -> Result<VhostMode, String> {
    match text {
        "auto" => Ok(VhostMode::Auto),
        "on" => Ok(VhostMode::On),
        "off" => Ok(VhostMode::Off),
        _ => Err(format!("vhost cannot be {text:?}: use auto, on or off")),
    }
}

pub(crate) fn parse_fs(text: &str) -> Result<FsConfig, String> {
    match text.split_once('=') {
        Some((tag, directory)) if !tag.is_empty() && !directory.is_empty() => {
            Ok(FsConfig { tag: tag.to_owned(), directory: directory.into(), guest_only: None })
        }
        _ => Err("give a tag and a directory, for instance work=/srv/work".to_owned()),
    }
}

pub(crate) fn parse_vfio(text: &str) -> Result<VfioConfig, String> {
    let mut parts = text.split(',');
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("give a device, for instance 0000:01:00.0")?;
    let mut config = VfioConfig { path: path.into(), clique: None, peer_to_peer: false };
    for part in parts {
        match (part, part.strip_prefix("clique=")) {
            ("p2p", _) => config.peer_to_peer = true,
            (_, Some(clique)) => config.clique = Some(clique.parse().map_err(|_| "a clique is a number from 0 to 15")?),
            _ => return Err(format!("{part:?} is no option of a device: use p2p or clique=N")),
        }
    }
    Ok(config)
}

#[expect(clippy::unnecessary_wraps, reason = "the signature is clap's")]
fn parse_output(text: &str) -> Result<ConsoleOutput, String> {
    Ok(if text == "-" { ConsoleOutput::Stdio } else { ConsoleOutput::File(text.into()) })
}

impl From<Run> for MachineConfig {
    fn from(run: Run) -> Self {
        let guest_cid = run.vsock_cid;
        Self {
            initrd: run.initrd,
            cmdline: run.cmdline,
            vcpus: run.cpus,
            memory: run.memory,
            memory_max: run.memory_max,
            huge_pages: run.huge_pages,
            balloon: run.balloon,
            pmem: run.pmem.into_iter().map(|Image { path, read_only }| PmemConfig { path, read_only }).collect(),
            disks: run.disk.into_iter().map(|Image { path, read_only }| DiskConfig { path, read_only }).collect(),
            net: run.net,
            fs: run.fs,
            vsock: run.vsock.map(|socket| VsockConfig { guest_cid, socket }),
            vfio: run.vfio,
            console: run.console.unwrap_or_default(),
            debug_uart: run.debug_uart.unwrap_or_default(),
            vcpus_max: run.max_cpus,
            hot_plug: run.control.is_some(),
            boot_timer: run.boot_timer,
            ..Self::new(run.kernel)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> MachineConfig {
        let all = ["dragonball", "run", "--kernel", "vmlinux"].iter().chain(arguments);
        match Cli::try_parse_from(all).unwrap().command {
            Command::Run(run) => (*run).into(),
            Command::Ctl(_) => panic!("not a machine"),
        }
    }

    #[test]
    fn every_option_reaches_the_machine() {
        let options = "--initrd initrd --cpus 2 --memory 1G --memory-max 4G --huge-pages --balloon --pmem a,ro --pmem b \
            --disk c --net tap=tap0 --net vhost=off,queues=4,mtu=9000,mac=02:00:00:00:00:07,tap=tap1 \
            --fs tag=/dir=1 --vsock sock --vsock-cid 7 --vfio 0000:01:00.0,p2p,clique=3 --vfio /dev/vfio/7 --console - \
            --debug-uart log --boot-timer --control control --max-cpus 4";
        let mut options: Vec<_> = options.split_whitespace().collect();
        options.extend(["--cmdline", "-x one=1"]);
        let machine = config(&options);
        let expected = MachineConfig {
            kernel: "vmlinux".into(),
            initrd: Some("initrd".into()),
            cmdline: "-x one=1".to_owned(),
            vcpus: 2,
            memory: 1 << 30,
            memory_max: Some(4 << 30),
            huge_pages: true,
            balloon: true,
            pmem: vec![
                PmemConfig { path: "a".into(), read_only: true },
                PmemConfig { path: "b".into(), read_only: false },
            ],
            disks: vec![DiskConfig { path: "c".into(), read_only: false }],
            net: vec![
                NetConfig::new("tap0"),
                NetConfig {
                    tap: TapSource::Name { name: "tap1".to_owned(), queues: 4 },
                    mac: Some("02:00:00:00:00:07".parse().unwrap()),
                    mtu: Some(9000),
                    vhost: VhostMode::Off,
                },
            ],
            fs: vec![FsConfig { tag: "tag".to_owned(), directory: "/dir=1".into(), guest_only: None }],
            vsock: Some(VsockConfig { guest_cid: 7, socket: "sock".into() }),
            vfio: vec![
                VfioConfig { path: "0000:01:00.0".into(), clique: Some(3), peer_to_peer: true },
                VfioConfig { path: "/dev/vfio/7".into(), clique: None, peer_to_peer: false },
            ],
            console: ConsoleOutput::Stdio,
            debug_uart: ConsoleOutput::File("log".into()),
            vcpus_max: Some(4),
            hot_plug: true,
            boot_timer: true,
        };
        assert_eq!(machine, expected);
    }

    #[test]
    fn sizes_are_understood_or_refused() {
        for (text, bytes) in [
            ("0", 0),
            ("512K", 512 << 10),
            ("128", 128 << 20),
            ("128m", 128 << 20),
            ("2G", 2 << 30),
            ("100T", 100 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "M", "1X", "-1M", "1.5G", "99999999999T", "99999999999999999", "99999999999999999999"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for option in [
            "--fs=tag",
            "--fs==/dir",
            "--pmem=,ro",
            "--cpus=300",
            "--memory=lots",
            "--memory-max=more",
            "--vfio=,p2p",
            "--vfio=a,b",
        ] {
            let arguments = ["dragonball", "run", "--kernel", "vmlinux", option];
            assert!(Cli::try_parse_from(arguments).is_err(), "{option}");
        }
    }

    #[test]
    fn a_network_card_that_cannot_be_meant_is_refused_with_what_is_wrong() {
        for (text, reason) in [
            ("", "has no value"),
            ("tap0", "has no value"),
            ("mac=02:00:00:00:00:01", "tap=tap0"),
            ("tap=a,tap=b", "given twice"),
            ("tap=a,speed=10", "no part of a network card"),
            ("tap=a,mac=ff:ff:ff:ff:ff:ff", "unicast"),
            ("tap=a,mtu=70000", "no number"),
            ("tap=a,queues=-1", "no number"),
            ("tap=a,vhost=maybe", "auto, on or off"),
        ] {
            let error = parse_net(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
