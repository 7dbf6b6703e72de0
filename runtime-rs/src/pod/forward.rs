//! Connections to the pod's loopback address on the host, carried to the servers in the guest: port-forwarding.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use network::Loopback;
use nix::sys::socket::{setsockopt, sockopt};
use protocols::agent::ForwardRequest;
use protocols::containerd::ttrpc;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

use super::Pod;
use super::sandbox::Sandbox;
use super::stdio::CHUNK;
use crate::error::{Error, chain};

/// Connections at a time; more wait until one ends.
const MAX_CONNECTIONS: usize = 256;
/// The guest's server must take a connection within this.
const DEADLINE: Duration = Duration::from_secs(10);

/// Carries all that is dialled, until the pod ends.
pub(super) fn serve(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>, loopback: Arc<Loopback>) {
    let (pod, sandbox) = (Arc::clone(pod), Arc::clone(sandbox));
    tokio::spawn(async move {
        if let Err(error) = accept_all(&pod, &sandbox, &loopback).await {
            tracing::warn!(%error, "no more connections are forwarded to the pod");
        }
    });
}

async fn accept_all(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>, loopback: &Loopback) -> io::Result<()> {
    let listener = TcpListener::from_std(loopback.listener().try_clone()?)?;
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let permit = Arc::clone(&free).acquire_owned().await.map_err(io::Error::other)?;
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            // Gone before it was taken.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        let (pod, sandbox) = (Arc::clone(pod), Arc::clone(sandbox));
        tokio::spawn(async move {
            if let Err(error) = carry(&pod, &sandbox, client).await {
                tracing::debug!(error = %chain(&error), "a connection to the pod was not forwarded");
            }
            drop(permit);
        });
    }
}

/// Joins `client` to the guest's port of the number that it dialled. One that cannot be joined is reset, which is as near as
/// an accepted connection comes to a refused one.
async fn carry(pod: &Pod, sandbox: &Sandbox, mut client: TcpStream) -> Result<(), Error> {
    let port = client.local_addr().map_err(Error::host("find the address of", "a forwarded connection"))?.port();
    match join(pod, sandbox, port).await {
        Ok(mut server) => {
            // Either side's end of the connection is no failure of the pod's.
            let moved = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, CHUNK, CHUNK).await;
            tracing::debug!(port, ?moved, "a forwarded connection has ended");
            Ok(())
        }
        Err(error) => {
            let now = libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = setsockopt(&client, sockopt::Linger, &now);
            Err(error)
        }
    }
}

async fn join(pod: &Pod, sandbox: &Sandbox, port: u16) -> Result<UnixStream, Error> {
    let (stream, opening) = pod.streams.expect();
    let request = ForwardRequest { port: port.into(), stream, ..ForwardRequest::default() };
    let joined = async {
        let context = ttrpc::context::with_duration(DEADLINE);
        sandbox.agent.forward(context, &request).await.map_err(|error| sandbox.explain(error))?;
        // The agent answers when it has opened the stream, so that only its arrival here is waited for.
        let opened = tokio::time::timeout(DEADLINE, opening).await;
        opened.ok().and_then(Result::ok).ok_or_else(|| Error::Unanswered(format!("no stream for port {port}")))
    };
    let joined = joined.await;
    if joined.is_err() {
        pod.streams.cancel(stream);
    }
    joined
}
