//! Volumes of which a container has a copy in the guest: whenever one is changed here, the copy follows.

use std::sync::Arc;

use nix::sys::inotify::{AddWatchFlags, Inotify};
use protocols::agent::RefreshCopyRequest;
use protocols::containerd::ttrpc;
use tokio::task::AbortHandle;

use super::sandbox::Sandbox;
use crate::error::{Error, chain};
use crate::host::notices::{self, Notices};
use crate::spec::Bind;

/// What changes a volume's content: names come and go, files are written and given away.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_ONLYDIR);

/// The followed volumes of a container; they are followed until this goes.
#[derive(Debug, Default)]
pub struct Followed(Vec<AbortHandle>);

impl Drop for Followed {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Volumes whose changes are noticed from now on, by their numbers.
#[derive(Debug)]
pub struct Watches(Vec<(u32, Inotify)>);

impl Watches {
    /// Watches those of `binds` that are copied.
    ///
    /// # Errors
    ///
    /// [`Error::Host`], [`Error::Invalid`].
    pub fn of(binds: &[Bind]) -> Result<Self, Error> {
        let copied = binds.iter().filter(|bind| bind.copied);
        copied.map(watch).collect::<Result<_, _>>().map(Self)
    }

    /// Has the copies of `container` follow.
    #[must_use]
    pub fn follow(self, container: &str, sandbox: &Arc<Sandbox>) -> Followed {
        let follow = |(number, changes)| {
            let (container, sandbox) = (container.to_owned(), Arc::clone(sandbox));
            let following = async move {
                if let Err(error) = refresh_always(changes, &container, number, &sandbox).await {
                    tracing::warn!(container, number, error = %chain(&error), "a copied volume is not watched any more");
                }
            };
            tokio::spawn(following).abort_handle()
        };
        Followed(self.0.into_iter().map(follow).collect())
    }
}

fn watch(bind: &Bind) -> Result<(u32, Inotify), Error> {
    let changes = notices::watch(&bind.source, CHANGES).map_err(Error::host("watch the volume", &bind.source))?;
    let number = u32::try_from(bind.number).map_err(|error| Error::Invalid(format!("too many mounts: {error}")))?;
    Ok((number, changes))
}

async fn refresh_always(changes: Inotify, container: &str, number: u32, sandbox: &Sandbox) -> Result<(), Error> {
    let failed = || Error::host("watch a volume of", container);
    let changes = Notices::of(changes).map_err(failed())?;
    loop {
        // Changes that came together are one to the copy.
        changes.changed().await.map_err(failed())?;
        let request =
            RefreshCopyRequest { container_id: container.to_owned(), number, ..RefreshCopyRequest::default() };
        let context = ttrpc::context::with_duration(sandbox.create_timeout);
        if let Err(error) = sandbox.agent.refresh_copy(context, &request).await {
            // What is half made here now is told again when it is whole.
            let error = sandbox.explain(error);
            tracing::warn!(container, number, error = %chain(&error), "a copy of a volume could not be changed");
        }
    }
}
