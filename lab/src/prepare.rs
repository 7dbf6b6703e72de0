//! Makes what a machine is restored from, step by step, each kept in the cache: tools, system, initrd, snapshot.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cache::{Cache, Key};
use kernel_config::build::Builder;
use kernel_config::profile::Profile;
use serde_json::json;
use tool::{io, run};

use crate::command::{Command, Input};
use crate::error::Error;
use crate::hardware::{self, Hardware, Kernel};
use crate::image::{Initrd, System};
use crate::machine::Machine;
use crate::model;
use crate::progress::Progress;
use crate::qemu::{End, PORTS, Parts, Plan, Start, arguments};
use crate::rundir::RunDir;
use crate::snapshot::Snapshot;
use crate::tools::Tools;

/// How long a machine may take from QEMU's start to containerd's readiness.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// Reads into the page cache what nearly every use of the machine runs, so that restored machines find it in memory,
/// and lets each program that a container start needs run once.
const WARM_UP: &str = "set -e
cat $(type -P containerd containerd-shim-runc-v2 ctr runc qemu-system-x86_64 tar bash) /usr/share/qemu/qboot.rom > /dev/null
ctr version > /dev/null
ctr namespaces create default
ctr images list > /dev/null
runc --version > /dev/null
containerd-shim-runc-v2 -v > /dev/null
qemu-system-x86_64 --version > /dev/null
sync";

/// Names of a snapshot's files.
const MEMORY: &str = "memory";
const DISK: &str = "disk.qcow2";

/// What machines are made of.
#[derive(Clone, Debug)]
pub(crate) struct Materials {
    pub(crate) tools: Tools,
    qemu: Tools,
    system: System,
    initrd: Initrd,
}

/// A snapshot in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    pub(crate) materials: Materials,
    dir: PathBuf,
}

/// Finds a snapshot in the cache, or makes all that is missing.
pub(crate) fn prepare(snapshot: Snapshot) -> Result<Prepared, Error> {
    let cache = Cache::open()?;
    let materials = materials(&cache)?;
    let key = key(snapshot, &materials);
    let dir = cache.get_or_build("lab-snapshot", &key, |dir| {
        make(snapshot, &Prepared { materials: materials.clone(), dir: dir.to_owned() })
    })?;
    Ok(Prepared { materials, dir })
}

/// Removes from the cache what the machines of today are not made of.
pub(crate) fn prune(cache: &Cache) -> Result<Vec<PathBuf>, Error> {
    let materials = materials(cache)?;
    let snapshots = Snapshot::ALL.map(|snapshot| key(snapshot, &materials).name());
    let mut removed = Vec::new();
    for (kind, kept) in [
        ("lab-tools", vec![materials.tools.id()]),
        ("lab-qemu", vec![materials.qemu.id()]),
        ("lab-gpu-model", vec![model::program_id()?]),
        ("lab-system", vec![materials.system.id()]),
        ("lab-initrd", vec![materials.initrd.id()]),
        ("lab-snapshot", snapshots.to_vec()),
        // Made again in seconds.
        ("lab-setup", Vec::new()),
    ] {
        let is_kept = |path: &Path| kept.iter().any(|name| path.ends_with(name));
        removed.extend(cache.retain(kind, is_kept)?);
    }
    Ok(removed)
}

/// Finds tools, QEMU, system and initrd in the cache, or makes them.
pub(crate) fn materials(cache: &Cache) -> Result<Materials, Error> {
    let pin = pin(cache)?;
    let tools = Tools::get(cache, &pin)?;
    let qemu = Tools::qemu(cache, &pin)?;
    let system = System::get(cache, &tools, &pin)?;
    let initrd = Initrd::get(cache, &system)?;
    Ok(Materials { tools, qemu, system, initrd })
}

fn pin_path(cache: &Cache) -> PathBuf {
    cache.root().join("lab-pin")
}

/// Which state of the archive the machines are built from; it changes only when asked.
fn pin(cache: &Cache) -> Result<String, Error> {
    let path = pin_path(cache);
    match fs::read_to_string(&path) {
        Ok(pin) => Ok(pin),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(io("read", &path)(error).into()),
    }
}

/// Lets the next build take the newest packages.
pub(crate) fn update_pin(cache: &Cache) -> Result<(), Error> {
    let path = pin_path(cache);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    fs::create_dir_all(cache.root()).map_err(io("create", cache.root()))?;
    Ok(fs::write(&path, now.as_secs().to_string()).map_err(io("write", &path))?)
}

fn key(snapshot: Snapshot, materials: &Materials) -> Key {
    let nowhere = Path::new("");
    let parts = parts(materials, snapshot, nowhere, nowhere);
    let ports: Vec<_> = (0..10).take(PORTS).collect();
    let line = arguments(snapshot, &parts, Start::Restore, 0, &ports);
    let line: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
    Key::new("1")
        .with("system", materials.system.id().as_bytes())
        .with("initrd", materials.initrd.id().as_bytes())
        .with("qemu", line.join("\n").as_bytes())
        .with("warm-up", WARM_UP.as_bytes())
}

/// The parts of a machine whose memory and disk are in `files` and whose console goes to `console`.
fn parts(materials: &Materials, snapshot: Snapshot, files: &Path, console: &Path) -> Parts {
    Parts {
        firmware: materials.qemu.firmware(),
        kernel: materials.system.kernel(),
        initrd: materials.initrd.path(),
        memory: files.join(MEMORY),
        fresh_memory: snapshot.memory(),
        disk: files.join(DISK),
        console: console.to_owned(),
        hardware: Vec::new(),
    }
}

impl Prepared {
    /// The same materials with memory, disk and state in another directory.
    pub(crate) fn at(&self, dir: PathBuf) -> Self {
        Self { materials: self.materials.clone(), dir }
    }

    /// A name for this very snapshot, for keys.
    pub(crate) fn id(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// A machine of this snapshot's files.
    pub(crate) fn plan(&self, snapshot: Snapshot, run_dir: &RunDir, start: Start, end: End) -> Plan {
        let parts = parts(&self.materials, snapshot, &self.dir, &run_dir.console());
        Plan { qemu: self.materials.qemu.clone(), snapshot, parts, start, end }
    }

    /// A machine that boots from this snapshot's disk with hardware of its own.
    pub(crate) fn fresh_plan(
        &self,
        snapshot: Snapshot,
        hardware: &Hardware,
        run_dir: &RunDir,
        end: End,
    ) -> Result<Plan, Error> {
        hardware.check()?;
        let mut plan = self.plan(snapshot, run_dir, Start::Fresh, end);
        plan.parts.hardware = hardware::options(hardware, run_dir);
        plan.parts.fresh_memory = hardware.chosen_memory().unwrap_or_else(|| snapshot.memory());
        if hardware.chosen_kernel() == Kernel::Iommufd {
            plan.parts.kernel = own_kernel(&Cache::open()?)?;
        }
        Ok(plan)
    }

    /// The file with the machine's memory.
    pub(crate) fn memory(&self) -> PathBuf {
        self.dir.join(MEMORY)
    }

    /// The machine's disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join(DISK)
    }

    /// The saved device state, for QEMU.
    pub(crate) fn state(&self) -> String {
        format!("file:{}", self.dir.join("state").display())
    }

    /// Makes the disk, empty over another one.
    pub(crate) fn create_disk(&self, base: &Path, base_format: &str) -> Result<(), Error> {
        let mut command = self.materials.tools.command("usr/bin/qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", base_format, "-b"]).arg(base).arg(self.disk());
        run("qemu-img", &mut command)?;
        Ok(())
    }
}

/// Finds the kernel with IOMMUFD in the cache, or builds it, which takes a quarter of an hour.
fn own_kernel(cache: &Cache) -> Result<PathBuf, Error> {
    let jobs = std::thread::available_parallelism().map_or(1, Into::into);
    let kernel = Builder { cache, jobs, build_tree: None }.build(Profile::Lab, &KernelSteps::default())?;
    Ok(kernel.directory.join("vmlinux"))
}

/// Tells of the kernel's build.
#[derive(Default)]
struct KernelSteps {
    current: RefCell<Option<Progress>>,
}

impl kernel_config::build::Progress for KernelSteps {
    fn step(&self, what: &str) {
        // The step before ends its line first.
        self.current.take();
        self.current.replace(Some(Progress::start(&format!("Kernel of the lab machine: {what}"), 0)));
    }

    fn compiled(&self, file: &str) {
        if let Some(step) = self.current.borrow().as_ref() {
            step.step(file);
        }
    }
}

/// Boots a machine and saves it once it is up.
fn make(snapshot: Snapshot, prepared: &Prepared) -> Result<(), Error> {
    let progress = Progress::start(&format!("Booting a lab machine for the snapshot {snapshot}"), 0);
    prepared.create_disk(&prepared.materials.system.disk(), "raw")?;
    let run_dir = RunDir::of(&format!("build-{snapshot}"))?;
    let plan = prepared.plan(snapshot, &run_dir, Start::Boot, End::WithThread);
    let machine = Machine::launch(run_dir, &plan)?;
    // The answer's connection is not needed, only that it comes.
    drop(machine.await_answer(BOOT_LIMIT)?);
    machine.run(&Command::shell(WARM_UP), Input::Empty)?.check()?;
    drop(progress);
    save(machine, &prepared.state())
}

/// Saves a machine's state and ends it; its memory and disk are in their files then.
pub(crate) fn save(machine: Machine, state: &str) -> Result<(), Error> {
    let mut qmp = machine.qmp()?;
    qmp.execute("stop", &json!({}))?;
    qmp.migrate("migrate", state)?;
    // QEMU talks to one at a time.
    drop(qmp);
    machine.quit()
}
