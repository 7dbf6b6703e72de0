//! The gate that everything which changes the host goes through: once it is closed, nothing begins any more, and what
//! had begun is given up and undone before the end of the pod undoes the rest.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, watch};

use crate::error::Error;

/// Containers that can be made at once.
const WIDTH: u32 = 1024;

/// Open while the pod lives.
#[derive(Debug)]
pub struct Gate {
    inside: Semaphore,
    closing: watch::Sender<bool>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { inside: Semaphore::new(WIDTH as usize), closing: watch::Sender::new(false) }
    }
}

impl Gate {
    /// Goes through; the pod's end waits until the permit is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::State`] when the pod ends.
    pub async fn enter(&self) -> Result<SemaphorePermit<'_>, Error> {
        if *self.closing.borrow() {
            return Err(ending());
        }
        self.inside.acquire().await.map_err(|_| ending())
    }

    /// Carries out `work` unless the pod ends first.
    ///
    /// # Errors
    ///
    /// That of `work`, or [`Error::State`].
    pub async fn unless_closed<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let mut closing = self.closing.subscribe();
        tokio::select! {
            done = work => done,
            _ = closing.wait_for(|closing| *closing) => Err(ending()),
        }
    }

    /// Lets nobody in any more, and waits until everybody is out, for at most `deadline`.
    pub async fn close(&self, deadline: Duration) {
        self.closing.send_replace(true);
        if tokio::time::timeout(deadline, self.inside.acquire_many(WIDTH)).await.is_err() {
            tracing::warn!("a container that is being made does not stop; `delete` undoes what it leaves");
        }
        self.inside.close();
    }
}

fn ending() -> Error {
    Error::State("the sandbox is ending; create it again".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn closing_ends_what_goes_on_and_refuses_what_comes() {
        let gate = Gate::default();
        let permit = gate.enter().await.unwrap();
        let never = gate.unless_closed(std::future::pending::<Result<(), Error>>());
        let inside = async {
            assert!(never.await.is_err());
            drop(permit);
        };
        tokio::join!(inside, gate.close(Duration::from_secs(60)));
        assert!(gate.enter().await.is_err());
    }
}
