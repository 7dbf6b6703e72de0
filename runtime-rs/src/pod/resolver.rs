//! Answers the guest's questions for names where docker does, in the network namespace of the pod.
//!
//! docker resolves the names of a network's containers at 127.0.0.11, by a server in the container's network namespace. In
//! the guest that is another loopback address; the agent listens there and hands on what it is asked.
//!
//! This process has left the host's network namespace by its first thread, on which all tasks run: the sockets that they open
//! are in the namespace that docker knows.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use protocols::resolver::{PORT, TCP, UDP};
use protocols::{RESOLVER, RESOLVER_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::Pod;
use super::stdio::CHUNK;
use crate::error::Error;

/// Questions at a time; more wait until one has its answer.
const MAX_QUESTIONS: usize = 64;
/// A question must come, and have its answer, within this; resolvers ask again sooner.
const DEADLINE: Duration = Duration::from_secs(20);
/// A connection may last for this: servers of names close idle ones after seconds.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(120);

/// Answers until the pod ends.
///
/// # Errors
///
/// [`Error::Host`] when the guest's dials cannot be listened for.
pub(super) fn serve(pod: &Pod) -> Result<(), Error> {
    let path = pod.paths.vsock_port(RESOLVER_PORT);
    let listener = UnixListener::bind(&path).map_err(Error::host("listen on", path))?;
    tokio::spawn(async move {
        let free = Arc::new(Semaphore::new(MAX_QUESTIONS));
        loop {
            let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
            let guest = match listener.accept().await {
                Ok((guest, _)) => guest,
                Err(error) => {
                    tracing::warn!(%error, "the guest's questions for names are not answered any more");
                    return;
                }
            };
            tokio::spawn(async move {
                if let Err(error) = answer(guest).await {
                    tracing::debug!(%error, "a question of the guest has no answer");
                }
                drop(permit);
            });
        }
    });
    Ok(())
}

async fn answer(mut guest: UnixStream) -> io::Result<()> {
    match tokio::time::timeout(DEADLINE, guest.read_u8()).await?? {
        UDP => tokio::time::timeout(DEADLINE, answer_one(&mut guest)).await?,
        TCP => tokio::time::timeout(CONNECTION_DEADLINE, carry(&mut guest)).await?,
        other => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("the guest asks by {other}, which is nothing")))
        }
    }
}

async fn answer_one(guest: &mut UnixStream) -> io::Result<()> {
    let mut question = vec![0; usize::from(guest.read_u16().await?)];
    guest.read_exact(&mut question).await?;
    let server = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    server.connect((RESOLVER, PORT)).await?;
    server.send(&question).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = server.recv(&mut answer).await?;
    guest.write_u16(u16::try_from(length).map_err(io::Error::other)?).await?;
    guest.write_all(&answer[..length]).await
}

async fn carry(guest: &mut UnixStream) -> io::Result<()> {
    let mut server = TcpStream::connect((RESOLVER, PORT)).await?;
    tokio::io::copy_bidirectional_with_sizes(guest, &mut server, CHUNK, CHUNK).await.map(drop)
}
