//! The guest's stdio streams: connections that the agent opens, each beginning with the id that it was asked for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};

/// A connection must say its id within this.
const ID_DEADLINE: Duration = Duration::from_secs(10);
/// Connections that have not said their id yet, at most: a hostile guest could open any number.
const MAX_ANONYMOUS: usize = 64;

/// The streams that a guest was asked to open and has not opened yet.
#[derive(Debug, Default)]
pub struct Streams {
    last: AtomicU64,
    expected: Mutex<Expected>,
}

#[derive(Debug, Default)]
struct Expected {
    closed: bool,
    streams: HashMap<u64, oneshot::Sender<UnixStream>>,
}

/// A stream that the guest will open, or not: dropping the registry's side ends the wait.
pub type Opening = oneshot::Receiver<UnixStream>;

impl Streams {
    /// Expects one more stream: its id, and where it arrives.
    pub fn expect(&self) -> (u64, Opening) {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, receiver) = oneshot::channel();
        let mut expected = self.lock();
        if !expected.closed {
            expected.streams.insert(id, sender);
        }
        (id, receiver)
    }

    /// No longer expects this stream.
    pub fn cancel(&self, id: u64) {
        self.lock().streams.remove(&id);
    }

    /// The guest is gone: nothing is expected any more.
    pub fn close(&self) {
        let mut expected = self.lock();
        expected.closed = true;
        expected.streams.clear();
    }

    /// Accepts the guest's connections until the listener fails.
    pub async fn serve(self: Arc<Self>, listener: UnixListener) {
        let anonymous = Arc::new(Semaphore::new(MAX_ANONYMOUS));
        loop {
            let Ok(permit) = anonymous.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "no more streams can be accepted");
                    return;
                }
            };
            let streams = Arc::clone(&self);
            tokio::spawn(async move {
                streams.identify(stream).await;
                drop(permit);
            });
        }
    }

    /// Reads the id and hands the stream to whoever waits for it; drops a stream that nobody asked for.
    async fn identify(&self, mut stream: UnixStream) {
        let Ok(Ok(id)) = tokio::time::timeout(ID_DEADLINE, stream.read_u64_le()).await else {
            tracing::warn!("the guest opened a stream without an id");
            return;
        };
        let waiting = self.lock().streams.remove(&id);
        match waiting {
            Some(waiting) => drop(waiting.send(stream)),
            None => tracing::warn!(id, "the guest opened a stream that nobody asked for"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    async fn open(path: &std::path::Path, id: u64) -> UnixStream {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_u64_le(id).await.unwrap();
        stream
    }

    #[tokio::test]
    async fn only_expected_ids_get_through_and_each_of_them_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let streams = Arc::new(Streams::default());
        tokio::spawn(Arc::clone(&streams).serve(UnixListener::bind(&path).unwrap()));
        let (id, opening) = streams.expect();
        let (cancelled, never) = streams.expect();
        streams.cancel(cancelled);

        for wrong in [id + 1000, cancelled] {
            assert_eq!(open(&path, wrong).await.read(&mut [0]).await.unwrap(), 0);
        }
        let mut guest = open(&path, id).await;
        let mut host = opening.await.unwrap();
        guest.write_all(b"hello").await.unwrap();
        let mut text = [0; 5];
        host.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hello");
        assert_eq!(open(&path, id).await.read(&mut [0]).await.unwrap(), 0);
        assert!(never.await.is_err());
    }

    #[tokio::test]
    async fn after_the_end_of_the_guest_nothing_waits_for_a_stream() {
        let streams = Streams::default();
        let (_, before) = streams.expect();
        streams.close();
        let (_, after) = streams.expect();
        assert!(before.await.is_err() && after.await.is_err());
    }
}
