//! Names as docker resolves them: what is asked at 127.0.0.11 goes to the host, whose answer goes back.
//!
//! docker writes that address into a container's resolv.conf. It is a loopback address: on the host, docker's own server is
//! there in the container's network namespace, and here this one is.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use protocols::resolver::{PORT, TCP, UDP};
use protocols::{RESOLVER, RESOLVER_PORT};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, spawn_local};

use crate::error::{Error, Result};
use crate::forward;
use crate::stdio::Watched;
use crate::transport::{self, Endpoint};

/// Questions and connections at a time; more wait until one has ended.
const MAX_QUESTIONS: usize = 64;
/// The longest question by UDP that is taken (RFC 6891, §6.2.5, and some room).
const QUESTION: usize = 8 << 10;
/// An answer must come within this; resolvers ask again sooner.
const DEADLINE: Duration = Duration::from_secs(20);

/// Listens as long as it lives.
#[derive(Debug)]
pub(crate) struct Resolver([AbortHandle; 2]);

impl Resolver {
    /// Begins to listen.
    pub(crate) fn start(endpoint: &Endpoint) -> Result<Self> {
        let address = SocketAddr::from((RESOLVER, PORT));
        let failed =
            |what: &str| Error::io(format!("cannot listen at {address} ({what}) to resolve the network's names"));
        let udp = std::net::UdpSocket::bind(address).and_then(|socket| {
            socket.set_nonblocking(true)?;
            UdpSocket::from_std(socket)
        });
        let udp = Rc::new(udp.map_err(failed("UDP"))?);
        let tcp = std::net::TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        let tcp = tcp.map_err(failed("TCP"))?;
        let free = Arc::new(Semaphore::new(MAX_QUESTIONS));
        let (by_udp, by_tcp) =
            (serve_udp(udp, endpoint.clone(), Arc::clone(&free)), serve_tcp(tcp, endpoint.clone(), free));
        Ok(Self([spawn_local(told(by_udp)).abort_handle(), spawn_local(told(by_tcp)).abort_handle()]))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

async fn told(served: impl Future<Output = io::Result<()>>) {
    if let Err(error) = served.await {
        tracing::warn!(%error, "the network's names are not resolved any more");
    }
}

async fn serve_udp(socket: Rc<UdpSocket>, endpoint: Endpoint, free: Arc<Semaphore>) -> io::Result<()> {
    let mut question = vec![0; QUESTION];
    loop {
        let permit = Arc::clone(&free).acquire_owned().await.map_err(io::Error::other)?;
        let (length, client) = socket.recv_from(&mut question).await?;
        let (socket, endpoint, question) = (Rc::clone(&socket), endpoint.clone(), question[..length].to_vec());
        spawn_local(async move {
            match tokio::time::timeout(DEADLINE, ask(&endpoint, &question)).await {
                // A client that is gone has asked in vain.
                Ok(Ok(answer)) => drop(socket.send_to(&answer, client).await),
                Ok(Err(error)) => tracing::debug!(%error, "a question for a name has no answer"),
                Err(_) => tracing::debug!("a question for a name has no answer in time"),
            }
            drop(permit);
        });
    }
}

async fn ask(endpoint: &Endpoint, question: &[u8]) -> Result<Vec<u8>> {
    let host = endpoint.dial(RESOLVER_PORT).await?;
    let length = u16::try_from(question.len()).map_err(|error| Error::invalid(error.to_string()))?;
    let message = [&[UDP][..], &length.to_be_bytes()[..], question].concat();
    transport::write_all(&host, &message).await.map_err(Error::io("cannot ask the host for a name"))?;
    read_message(&host).await.map_err(Error::io("the host has no answer for a name"))
}

/// A length in two bytes, and as many.
async fn read_message(host: &Watched) -> io::Result<Vec<u8>> {
    let whole = |bytes: &[u8]| {
        let (length, message) = bytes.split_first_chunk()?;
        message.get(..usize::from(u16::from_be_bytes(*length))).map(<[u8]>::to_vec)
    };
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match transport::try_read(host, &mut chunk).await? {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => bytes.extend_from_slice(&chunk[..count]),
            None => {}
        }
        if let Some(message) = whole(&bytes) {
            return Ok(message);
        }
    }
}

async fn serve_tcp(listener: TcpListener, endpoint: Endpoint, free: Arc<Semaphore>) -> io::Result<()> {
    loop {
        let permit = Arc::clone(&free).acquire_owned().await.map_err(io::Error::other)?;
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            // Gone before it was taken.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        let endpoint = endpoint.clone();
        spawn_local(async move {
            // The host ends connections that last too long.
            if let Err(error) = join(&endpoint, client).await {
                tracing::debug!(%error, "a connection for names has ended");
            }
            drop(permit);
        });
    }
}

async fn join(endpoint: &Endpoint, client: TcpStream) -> Result<()> {
    let failed = "cannot carry a connection for names";
    let client = client.into_std().and_then(|client| crate::sys::watch(client.into())).map_err(Error::io(failed))?;
    let host = endpoint.dial(RESOLVER_PORT).await?;
    transport::write_all(&host, &[TCP]).await.map_err(Error::io(failed))?;
    futures::try_join!(forward::carry(&host, &client), forward::carry(&client, &host)).map_err(Error::io(failed))?;
    Ok(())
}
