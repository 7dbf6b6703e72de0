//! `Create`: the sandbox at the first container, then the container in it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use config::Config;
use journal::{Effect, EffectId};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use protocols::agent::{ContainerOptions, PciDevice};
use protocols::containerd::api::{CreateTaskRequest, Mount};
use protocols::containerd::events::task::{TaskCreate, TaskIO};
use protocols::containerd::topics::TASK_CREATE_EVENT_TOPIC;
use protocols::containerd::ttrpc;
use protocols::{BUNDLES_DIR, CONTAINER_OPTIONS_TYPE_URL, SHARED_DIR};

use super::Pod;
use super::containers::{self, Container, Hold, Kind};
use super::copies::Watches;
use super::follow::Follower;
use super::process::Process;
use super::sandbox::Sandbox;
use super::stdio::{Names, Pumps};
use super::{forward, operations};
use crate::error::Error;
use crate::host::blocking;
use crate::host::cgroup::PodCgroup;
use crate::host::mount;
use crate::host::share::{self, Share};
use crate::machine::{Blueprint, HostDevice};
use crate::network::Network;
use crate::paths;
use crate::root_disk::RootDisk;
use crate::sizing::{Demand, Host, Range};
use crate::spec::{Bind, GuestSpec, NetworkPlace, Passed, Role, Spec, SpecError};

/// Makes container `request.id`, and the sandbox if it is the first one.
///
/// # Errors
///
/// [`Error`]; nothing of the container is left then.
pub async fn create(pod: &Arc<Pod>, request: CreateTaskRequest) -> Result<u32, Error> {
    pod.stamp("Create");
    paths::check("id", &request.id)?;
    let _inside = pod.gate.enter().await?;
    if !request.checkpoint.is_empty() {
        let text = "a container cannot be restored from a checkpoint; create it without one";
        return Err(Error::Unsupported(text.to_owned()));
    }
    let reservation = pod.containers.reserve(&request.id)?;
    let container = match prepare(pod, &request).await? {
        Some(prepared) => make(pod, &request, prepared).await?,
        None => pause(&request),
    };
    let (container, abandoned) = reservation.fill(container);
    if !container.is_pause() {
        containers::watch(pod, &container, container.init());
    }
    if abandoned {
        operations::discard(pod, &container).await;
        return Err(Error::State(format!("container {} was deleted while it was being made", request.id)));
    }
    pod.stamp("container created");
    let event = TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..TaskIO::default()
        }),
        pid: Pod::pid(),
        ..TaskCreate::default()
    };
    pod.events.publish(TASK_CREATE_EVENT_TOPIC, &event);
    Ok(Pod::pid())
}

/// What of a container is stored on the host, and how the guest is to use it.
struct Stored {
    guest: GuestSpec,
    watches: Watches,
    effects: Vec<EffectId>,
}

/// What the host has ready for a container.
struct Prepared {
    stored: Stored,
    limits: Demand,
    devices: Wanted,
    sandbox: Arc<Sandbox>,
}

/// The devices of the host that a container is to have.
#[derive(Clone)]
struct Wanted {
    root: Option<RootDisk>,
    passed: Vec<Passed>,
}

impl Wanted {
    /// All of them.
    fn all(&self) -> Vec<HostDevice> {
        let root = self.root.iter().map(|root| root.device.clone());
        root.chain(self.passed.iter().map(|passed| passed.device.clone())).collect()
    }
}

/// What of them it has in the guest.
struct Given {
    rootfs: Mount,
    devices: Vec<PciDevice>,
}

/// Prepares storage while the machine boots, if it does not run yet. Nothing for a sandbox container, which has no
/// process of its own.
async fn prepare(pod: &Arc<Pod>, request: &CreateTaskRequest) -> Result<Option<Prepared>, Error> {
    let bundle = PathBuf::from(&request.bundle);
    let rootfs = request.rootfs.clone();
    let read = blocking::run("bundle", move || {
        let spec = Spec::read(&bundle)?;
        let devices = Wanted { root: RootDisk::of(&rootfs), passed: spec.devices() };
        Ok::<_, SpecError>((spec, devices))
    });
    let (mut spec, devices) = read.await??;
    let (role, limits) = (spec.role(&request.id), spec.limits());
    if let Role::Member(_) = role {
        let sandbox = Arc::clone(pod.sandbox()?);
        if let Some(files) = pod.files.get() {
            spec.complete(&files.places());
        }
        let stored = store(pod, request, spec, devices.root.is_none()).await?;
        return Ok(Some(Prepared { stored, limits, devices, sandbox }));
    }
    let named = containers::config_path(request.options.as_ref())?;
    if let Role::Sandbox(_) = role {
        let blueprint = plan_sandbox(pod, &spec, named).await?;
        // Its root file system is nobody's: it has no process.
        let passed = Wanted { root: None, ..devices };
        boot(pod, &Blueprint { devices: passed.all(), ..blueprint }).await?;
        return Ok(None);
    }
    let blueprint = found(pod, &spec, Some(limits), named).await?;
    let blueprint = Blueprint { devices: devices.all(), ..blueprint };
    match tokio::join!(store(pod, request, spec, devices.root.is_none()), boot(pod, &blueprint)) {
        (Ok(stored), Ok(sandbox)) => Ok(Some(Prepared { stored, limits, devices, sandbox })),
        (Ok(stored), Err(error)) => {
            containers::undo(pod, stored.effects).await;
            Err(error)
        }
        (Err(error), _) => Err(error),
    }
}

/// Prepares what the sandbox of an orchestrator needs on the host before its machine starts.
pub(super) async fn plan_sandbox(pod: &Arc<Pod>, spec: &Spec, config: Option<PathBuf>) -> Result<Blueprint, Error> {
    // Its members come later; the orchestrator may tell what they will need.
    let announced = Demand::of_sandbox(&spec.annotations());
    let mut blueprint = found(pod, spec, announced, config).await?;
    // Nobody tells a pod of the volumes and devices that its containers will have.
    blueprint.devices_can_come = true;
    // Those of a container alone are set when it is made.
    blueprint.sysctls = spec.sysctls();
    Ok(blueprint)
}

/// The name that the specification gives; without one, a container of another runtime would see the host's.
fn hostname(spec: &Spec) -> String {
    if !spec.hostname().is_empty() {
        return spec.hostname().to_owned();
    }
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

/// What a sandbox needs on the host before its machine starts.
async fn found(
    pod: &Arc<Pod>,
    spec: &Spec,
    announced: Option<Demand>,
    config: Option<PathBuf>,
) -> Result<Blueprint, Error> {
    let pod = Arc::clone(pod);
    let (cgroups_path, annotations, hostname) = (spec.cgroups_path().to_owned(), spec.annotations(), hostname(spec));
    let (place, shared_memory) = (spec.network(), spec.shared_memory());
    // Room for what comes later costs the guest time when it boots.
    let cards_can_come = place == NetworkPlace::Own && spec.awaits_network();
    if place == NetworkPlace::Own {
        // By this thread, and before anybody is told the number of this process.
        network::leave_host()?;
    }
    blocking::run("found", move || {
        let (mut config, _) = Config::load(config.as_deref())?;
        config.annotate(&annotations).map_err(config::ConfigError::from)?;
        let size = Range::plan(&config, announced, Host::this())?;
        pod.facts().timeline_dir.clone_from(&config.runtime.timeline_dir);
        pod.stamp("configuration read");
        // Before the machine: its memory is to be charged to the pod.
        let cgroup = PodCgroup::join(&cgroups_path, &pod.journal)?;
        pod.facts().cgroup = cgroup;
        share::prepare(&pod.paths, &pod.journal)?;
        if config.hypervisor.enable_debug {
            pod.journal.record(Effect::File { path: pod.paths.console() })?;
        }
        let network = Network::join(&place, &pod.journal)?;
        pod.stamp("network joined");
        let shm_size = shared_memory.map(|path| mount::tmpfs_size(&path)).transpose()?.unwrap_or_default();
        let (devices, devices_can_come, sysctls) = (Vec::new(), cards_can_come, HashMap::new());
        Ok(Blueprint { config, size, hostname, network, devices, devices_can_come, sysctls, shm_size })
    })
    .await?
}

/// Boots the pod's machine, once.
pub(super) async fn boot(pod: &Arc<Pod>, blueprint: &Blueprint) -> Result<Arc<Sandbox>, Error> {
    let boot = async || Ok::<_, Error>(Arc::new(Sandbox::boot(pod, blueprint).await?));
    let sandbox = Arc::clone(pod.gate.unless_closed(pod.sandbox.get_or_try_init(boot)).await?);
    if blueprint.config.agent.debug_console {
        pod.containers.open_debug_console();
    }
    containers::watch_sandbox(pod, &sandbox);
    if let Some(loopback) = &blueprint.network.loopback {
        forward::serve(pod, &sandbox, Arc::clone(loopback));
    }
    if blueprint.network.own && pod.follower.get().is_none() {
        // Before anybody is told the number of this process: what comes then is heard of.
        let _ = pod.follower.set(Follower::start(pod, &sandbox, blueprint.is_pluggable()).await?);
    }
    Ok(sandbox)
}

/// Mounts what the container has on the host, with or without its root file system, and rewrites its specification
/// accordingly.
async fn store(pod: &Arc<Pod>, request: &CreateTaskRequest, spec: Spec, with_root: bool) -> Result<Stored, Error> {
    let (pod, id, rootfs) = (Arc::clone(pod), request.id.clone(), request.rootfs.clone());
    blocking::run("store", move || {
        let root = spec.root();
        let guest = spec.into_guest(&id)?;
        // Before the copies are made: what changes meanwhile is copied once more.
        let watches = Watches::of(&guest.binds)?;
        let mut share = Share::create(&pod.paths, &id, &pod.journal)?;
        let root = if with_root { share.rootfs(&rootfs, &root) } else { Ok(()) };
        let mounted = root.and_then(|()| bind_all(&mut share, &guest.binds));
        let effects = std::mem::take(&mut share.effects);
        if let Err(error) = mounted {
            for failure in pod.journal.undo_all(&effects) {
                tracing::warn!(%failure, "left behind");
            }
            return Err(error);
        }
        pod.stamp("rootfs mounted");
        Ok(Stored { guest, watches, effects })
    })
    .await?
}

fn bind_all(share: &mut Share<'_>, binds: &[Bind]) -> Result<(), Error> {
    binds.iter().try_for_each(|bind| share.bind(bind.number, &bind.source, bind.recursive))
}

/// The container that stands for a pod.
fn pause(request: &CreateTaskRequest) -> Container {
    let init = Process::new(String::new(), names(request), Pumps::default());
    Container::new(request.id.clone(), request.bundle.clone(), init, Hold::default(), Kind::Pause)
}

/// Makes the machine large enough for the container, and the container in the guest.
async fn make(pod: &Arc<Pod>, request: &CreateTaskRequest, prepared: Prepared) -> Result<Container, Error> {
    let Prepared { stored: Stored { guest, watches, effects }, limits, devices, sandbox } = prepared;
    let names = names(request);
    let made = async {
        pod.gate.unless_closed(sandbox.resizer.hold(&request.id, limits)).await?;
        let made = async {
            let given = pod.gate.unless_closed(give(&sandbox, &request.id, &devices)).await?;
            make_in_guest(pod, request, (guest, given), &names, &sandbox).await
        };
        let made = made.await;
        if made.is_err() {
            sandbox.devices.give_back(&request.id).await;
            sandbox.resizer.release(&request.id, None).await;
        }
        made
    };
    match made.await {
        Ok(pumps) => {
            let init = Process::new(String::new(), names, pumps);
            let hold = Hold { effects, limits, copies: watches.follow(&request.id, &sandbox) };
            Ok(Container::new(request.id.clone(), request.bundle.clone(), init, hold, Kind::Ordinary))
        }
        Err(error) => {
            containers::undo(pod, effects).await;
            Err(error)
        }
    }
}

/// Gives container `id` its devices.
async fn give(sandbox: &Sandbox, id: &str, wanted: &Wanted) -> Result<Given, Error> {
    let rootfs = match &wanted.root {
        Some(root) => root.mount(id, &sandbox.devices.take(id, &root.device).await?),
        None => shared_rootfs(id),
    };
    Ok(Given { rootfs, devices: sandbox.devices.take_all(id, &wanted.passed).await? })
}

/// The root file system that the host has mounted for container `id`, as the guest sees it.
fn shared_rootfs(id: &str) -> Mount {
    Mount {
        type_: "bind".to_owned(),
        source: format!("{SHARED_DIR}/{id}/rootfs"),
        target: format!("{BUNDLES_DIR}/{id}/rootfs"),
        options: vec!["rbind".to_owned()],
        ..Mount::default()
    }
}

async fn make_in_guest(
    pod: &Arc<Pod>,
    request: &CreateTaskRequest,
    (guest, given): (GuestSpec, Given),
    names: &Names,
    sandbox: &Sandbox,
) -> Result<Pumps, Error> {
    let (streams, pumps) = Pumps::start(names, &pod.streams, &pod.first_byte).await?;
    let request = guest_request(&request.id, guest, given, &streams)?;
    let context = ttrpc::context::with_duration(sandbox.create_timeout);
    let created = async { sandbox.task.create(context, &request).await.map_err(|error| sandbox.explain(error)) };
    pod.gate.unless_closed(created).await?;
    Ok(pumps)
}

fn names(request: &CreateTaskRequest) -> Names {
    Names {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}

/// The request as the agent takes it: paths of the guest, streams, and the rewritten specification.
fn guest_request(id: &str, guest: GuestSpec, given: Given, streams: &Names) -> Result<CreateTaskRequest, Error> {
    let Given { rootfs, devices } = given;
    let GuestSpec { json: spec, sandbox_pidns, binds } = guest;
    // They are counted from 0 and bounded by the specification's size.
    let copies = binds.iter().filter(|bind| bind.copied).filter_map(|bind| u32::try_from(bind.number).ok()).collect();
    let options = ContainerOptions { spec, devices, sandbox_pidns, copies, ..ContainerOptions::default() };
    let options = Any {
        type_url: CONTAINER_OPTIONS_TYPE_URL.to_owned(),
        value: options.write_to_bytes().map_err(|error| Error::Invalid(error.to_string()))?,
        ..Any::default()
    };
    Ok(CreateTaskRequest {
        id: id.to_owned(),
        bundle: format!("{BUNDLES_DIR}/{id}"),
        rootfs: vec![rootfs],
        terminal: streams.terminal,
        stdin: streams.stdin.clone(),
        stdout: streams.stdout.clone(),
        stderr: streams.stderr.clone(),
        options: MessageField::some(options),
        ..CreateTaskRequest::default()
    })
}
