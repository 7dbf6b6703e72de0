//! Blocking work off the async thread: one short-lived thread per piece, so that an idle pod keeps no pool.

use tokio::sync::oneshot;

use crate::error::Error;

/// Stack of a helper thread (bytes); only touched pages cost memory.
const STACK: usize = 512 << 10;

/// Runs `work` on a thread of its own. The work runs to its end even when the caller is dropped meanwhile.
///
/// # Errors
///
/// [`Error::Host`] when no thread can be made, or when the work panicked.
pub async fn run<T: Send + 'static>(name: &'static str, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let (done, result) = oneshot::channel();
    let body = move || {
        // Nobody listens any more when the request was given up.
        let _ = done.send(work());
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(body)
        .map_err(Error::host("start the thread", name))?;
    result.await.map_err(|_| Error::host("finish the thread", name)(std::io::Error::other("it panicked")))
}
