//! Connections from the host to servers in the guest: a port of the loopback address joined to a stream.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use protocols::agent::ForwardRequest;
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use crate::error::{Error, Result};
use crate::stdio::{self, Watched};
use crate::transport::{self, Endpoint};

/// Dials the port, then the stream, and moves bytes between both until both directions have ended.
///
/// # Errors
/// [`Error::Invalid`], [`Error::NoServer`], or what dialling the host fails with.
pub(crate) async fn forward(endpoint: &Endpoint, request: &ForwardRequest) -> Result<()> {
    let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| Error::invalid(format!("port {}: expected 1 to 65535", request.port)))?;
    let server = dial(port).await?;
    let host = stdio::open_stream(endpoint, request.stream).await?;
    spawn_local(async move {
        let both = futures::try_join!(carry(&host, &server), carry(&server, &host));
        if let Err(error) = both {
            tracing::debug!(%error, port, "a forwarded connection broke");
        }
    });
    Ok(())
}

/// A server may listen at either family's address, as `localhost` stands for both.
async fn dial(port: u16) -> Result<Watched> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let connected = match TcpStream::connect(v4).await {
        Err(_) => TcpStream::connect(v6).await,
        connected => connected,
    };
    let no_server = |source| Error::NoServer { port, source };
    let stream = connected.and_then(TcpStream::into_std).map_err(no_server)?;
    crate::sys::watch(stream.into()).map_err(no_server)
}

/// Everything from one to the other, then the end of it.
pub(crate) async fn carry(from: &Watched, to: &Watched) -> std::io::Result<()> {
    stdio::pump(from, async |bytes| transport::write_all(to, bytes).await).await?;
    transport::half_close(to)
}
