//! PID 1 of the guest: sets the guest up and runs its containers.
//!
//! The agent boots the guest ([`boot`]), dials the host ([`transport`]) and serves ttrpc on that one connection
//! ([`service`]). Containers are made by helpers: this binary again, single-threaded, calling libcontainer ([`helper`]).

mod boot;
mod cgroup;
mod containers;
mod copies;
mod devices;
mod error;
mod events;
mod forward;
mod guest;
mod helper;
mod hotplug;
mod launch;
mod logging;
mod memory_types;
mod mounts;
mod network;
mod passthrough;
mod process;
mod reaper;
mod resolver;
mod service;
mod setup;
mod stats;
mod stdio;
mod sys;
mod timeline;
mod transport;
mod uevents;

use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use error::{Error, Result};
use guest::Guest;
use reaper::Reaper;
use timeline::Timeline;
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};
use transport::{Endpoint, HostConnection};
use ttrpc::asynchronous::transport::Listener;

/// Parent of what the agent keeps while it runs, on a tmpfs.
const RUNTIME_DIR: &str = "/run/kata-containers";

/// How long a host that asked for the end has to take its answer.
const FAREWELL: Duration = Duration::from_millis(200);

const USAGE: &str = "\
kata-agent: PID 1 of a Tatami guest; the kernel starts it with init=/sbin/kata-agent.

Usage: kata-agent [--dial ENDPOINT] [--help] [--version]

  --dial ENDPOINT   where the host listens: vsock:<cid>, or unix:</path/prefix> for ports at
                    /path/prefix_<port>. Default: the kernel parameter agent.dial, else vsock:2
  --help            this text
  --version         the version

Kernel parameters: agent.dial=ENDPOINT, agent.log=error|warn|info|debug|trace (default: info)
";

fn main() -> ExitCode {
    let mut timeline = Timeline::default();
    timeline.stamp("init exec");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == helper::ARGUMENT) {
        return exit_code(helper::main());
    }
    if arguments.first().is_some_and(|first| first == helper::pause::ARGUMENT) {
        return exit_code(helper::pause::main().map(|never| match never {}));
    }
    if std::process::id() == 1 { run_as_init(&arguments, timeline) } else { run_as_command(&arguments, timeline) }
}

fn exit_code<E: std::fmt::Display>(outcome: std::result::Result<(), E>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// PID 1 must not return: the kernel would panic, and the host would not learn why.
fn run_as_init(arguments: &[String], mut timeline: Timeline) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        boot::report_fatal(&format!("internal error: {panic}"));
        let _ = boot::power_off();
    }));
    let outcome = boot::mount_all().and_then(|()| {
        timeline.stamp("mounts done");
        logging::install(boot::kernel_parameter("log").as_deref());
        boot::enable_controllers()?;
        boot::loopback_up();
        // Other words are kernel parameters that the kernel did not know and handed on.
        let dial = option(arguments, "--dial").or_else(|| boot::kernel_parameter("dial"));
        serve(dial.as_deref(), timeline)
    });
    if let Err(error) = outcome {
        boot::report_fatal(&error.to_string());
    }
    match boot::power_off() {
        Ok(never) => match never {},
        Err(error) => exit_code(Err(error)),
    }
}

/// Outside of a guest there is nothing to boot: for people who ask for help.
fn run_as_command(arguments: &[String], timeline: Timeline) -> ExitCode {
    match arguments {
        [only] if only == "--help" => print!("{USAGE}"),
        [only] if only == "--version" => println!("kata-agent {}", env!("CARGO_PKG_VERSION")),
        [dial, endpoint] if dial == "--dial" => {
            logging::install(None);
            return exit_code(serve(Some(endpoint), timeline));
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn option(arguments: &[String], name: &str) -> Option<String> {
    arguments.iter().skip_while(|argument| *argument != name).nth(1).cloned()
}

/// Serves the host until it asks for the end or its connection is lost.
fn serve(dial: Option<&str>, timeline: Timeline) -> Result<()> {
    let endpoint = match dial {
        Some(text) => text.parse().map_err(Error::invalid)?,
        None => Endpoint::default(),
    };
    // Orphans of containers must fall to this process, which reaps them, even when it is not PID 1.
    nix::sys::prctl::set_child_subreaper(true).map_err(Error::io("cannot become a subreaper"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::io("cannot start the event loop"))?;
    LocalSet::new().block_on(&runtime, serve_host(endpoint, timeline))
}

async fn serve_host(endpoint: Endpoint, mut timeline: Timeline) -> Result<()> {
    let children = Reaper::listen().map_err(Error::io("cannot watch children"))?;
    let reaper = Rc::new(Reaper::default());
    spawn_local(Rc::clone(&reaper).run(children));

    let connection = endpoint.dial(protocols::AGENT_PORT).await?;
    timeline.stamp("dialled");
    let lost = Arc::new(Notify::new());
    let connection = HostConnection::new(connection, Arc::clone(&lost));
    let only = futures::stream::once(async { Ok(connection) });
    let listener = Listener::new(futures::StreamExt::chain(only, futures::stream::pending()));

    let (services, mut jobs) = service::services();
    let mut server = ttrpc::r#async::Server::new().add_listener(listener).register_service(services);
    server
        .start()
        .await
        .map_err(|error| Error::Io { what: "cannot serve".into(), source: std::io::Error::other(error) })?;
    timeline.stamp("ready");
    if std::process::id() == 1 {
        boot::rest_random_source();
    }

    let guest = Guest::new(endpoint, reaper, timeline);
    let shutdown = Arc::clone(&jobs.shutdown);
    tokio::select! {
        () = jobs.run(&guest) => {}
        () = lost.notified() => tracing::info!("the host closed the connection"),
        () = shutdown.notified() => {
            // The host has its answer when it hangs up; one that does not is not waited for.
            let _ = tokio::time::timeout(FAREWELL, lost.notified()).await;
        }
    }
    guest.dismantle_all().await;
    Ok(())
}
