//! The metrics over HTTP, on a socket that only its owner may use.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::stat::{Mode, umask};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use super::text::render;
use crate::ctl::CtlError;
use crate::ctl::survey::survey;
use crate::ctl::task::Ask;
use crate::error::chain;

/// Clients that are served at the same time; others wait.
const CLIENTS: usize = 4;
/// A request's head is never longer (bytes): it has no body, and nothing in it matters but the first line.
const MAX_HEAD: usize = 16 << 10;
/// How long a client may take for its request.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// How long a client may take in all, its reading included.
const CLIENT_DEADLINE: Duration = Duration::from_secs(60);
/// Of the format that [`render`] writes.
const FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Serves until this process is told to end.
pub(super) async fn serve(path: &Path, root: PathBuf, ask: Ask) -> Result<(), CtlError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = listen(path).await?;
    let result = tokio::select! {
        result = accept(&listener, root, ask) => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // Whatever ended it, the next one finds no socket in its way.
    std::fs::remove_file(path).map_err(CtlError::file("remove", path))?;
    result.map_err(CtlError::System)
}

/// Serves whoever comes.
async fn accept(listener: &UnixListener, root: PathBuf, ask: Ask) -> std::io::Result<()> {
    let seats = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let seat = Arc::clone(&seats).acquire_owned().await.map_err(std::io::Error::other)?;
        let (client, _) = listener.accept().await?;
        let root = root.clone();
        tokio::spawn(async move {
            talk(client, root, ask).await;
            drop(seat);
        });
    }
}

/// A socket at `path`. One that an earlier process left there is replaced; one that is served is not.
async fn listen(path: &Path) -> Result<UnixListener, CtlError> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused =
        is_socket && UnixStream::connect(path).await.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if refused {
        std::fs::remove_file(path).map_err(CtlError::file("remove", path))?;
    }
    // From its first instant on, nobody else may connect. No other thread makes files now.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener.map_err(CtlError::file("listen on", path))
}

/// Answers one request.
async fn talk(client: UnixStream, root: PathBuf, ask: Ask) {
    let service = service_fn(move |request: Request<Incoming>| {
        let root = root.clone();
        async move { Ok::<_, Infallible>(answer(&request, root, ask).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(client), service);
    match tokio::time::timeout(CLIENT_DEADLINE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("kata-ctl: a client: {}", chain(&error)),
        Err(_) => eprintln!("kata-ctl: a client took longer than {CLIENT_DEADLINE:?}"),
    }
}

async fn answer(request: &Request<Incoming>, root: PathBuf, ask: Ask) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "the metrics are at /metrics\n".to_owned());
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "use GET\n".to_owned());
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    match survey(root, ask).await {
        Ok(seen) => {
            let mut response = plain(StatusCode::OK, render(&seen));
            response.headers_mut().insert(CONTENT_TYPE, FORMAT);
            response
        }
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{}\n", chain(&error))),
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
