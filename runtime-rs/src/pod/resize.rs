//! Keeps a machine as large as the limits of its containers say: one task, one change at a time.
//!
//! Growing is part of the request that needs it, and either succeeds or leaves everything as it was. Shrinking follows
//! behind: a guest may need time to free memory, or not be able to, and no request waits for that. What was reached is
//! logged.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use protocols::agent::OnlineCpuMemRequest;
use protocols::agent_ttrpc::AgentServiceClient;
use protocols::containerd::ttrpc;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, chain};
use crate::host::blocking;
use crate::machine::{ChangeError, Hardware};
use crate::sizing::{Demand, Range, Size};

/// How long the guest gets to give something back.
const SHRINK_DEADLINE: Duration = Duration::from_secs(10);
/// Changes that wait for their turn.
const QUEUE: usize = 64;

/// A request to the task.
enum Order {
    /// The machine is to hold a container with these limits.
    Hold { id: String, demand: Demand, reply: oneshot::Sender<Result<(), Error>> },
    /// The limits of a container are now these, or it is gone; the machine may shrink.
    Release { id: String, demand: Option<Demand> },
}

/// Gives orders to the task. The task ends when this is dropped.
#[derive(Debug, Clone)]
pub struct Resizer(mpsc::Sender<Order>);

impl Resizer {
    /// Starts the task for a machine that has its boot size.
    #[must_use]
    pub fn start(hardware: Arc<dyn Hardware>, agent: AgentServiceClient, range: Range, deadline: Duration) -> Self {
        let (sender, orders) = mpsc::channel(QUEUE);
        let reached = range.boot;
        let task = Task { hardware, agent, range, deadline, demands: HashMap::new(), reached };
        tokio::spawn(task.run(orders));
        Self(sender)
    }

    /// Makes the machine large enough for container `id` with these limits beside the others. It does not shrink for
    /// lower ones: [`Self::release`] does.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] and [`Error::Grow`]; the machine is as it was then.
    pub async fn hold(&self, id: &str, demand: Demand) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::GuestGone("nothing resizes it any more".to_owned());
        self.0.send(Order::Hold { id: id.to_owned(), demand, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The limits of container `id` are now these, or it is gone: the machine shrinks to what is needed, later.
    pub async fn release(&self, id: &str, demand: Option<Demand>) {
        // Without the task, the machine is gone too.
        let _ = self.0.send(Order::Release { id: id.to_owned(), demand }).await;
    }
}

/// What the task knows.
struct Task {
    hardware: Arc<dyn Hardware>,
    agent: AgentServiceClient,
    range: Range,
    deadline: Duration,
    demands: HashMap<String, Demand>,
    reached: Size,
}

impl Task {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Hold { id, demand, reply } => {
                    let result = self.hold(id, demand).await;
                    // Whoever gave up holds what it asked for until it is released.
                    let _ = reply.send(result);
                }
                Order::Release { id, demand } => self.release(id, demand).await,
            }
        }
    }

    async fn hold(&mut self, id: String, demand: Demand) -> Result<(), Error> {
        let before = self.demands.insert(id.clone(), demand);
        let grown = match self.range.target(Demand::sum(self.demands.values())) {
            Ok(target) => self.grow(target).await,
            Err(error) => Err(error.into()),
        };
        if grown.is_err() {
            self.set(id, before);
        }
        grown
    }

    fn set(&mut self, id: String, demand: Option<Demand>) {
        match demand {
            Some(demand) => drop(self.demands.insert(id, demand)),
            None => drop(self.demands.remove(&id)),
        }
    }

    async fn release(&mut self, id: String, demand: Option<Demand>) {
        self.set(id, demand);
        // What all containers had was possible; what is left of it is.
        if let Ok(target) = self.range.target(Demand::sum(self.demands.values())) {
            self.shrink(target).await;
        }
    }

    /// Grows to at least `target`, or takes back what it did.
    async fn grow(&mut self, target: Size) -> Result<(), Error> {
        let before = self.reached;
        let wanted = Size { vcpus: target.vcpus.max(before.vcpus), memory: target.memory.max(before.memory) };
        if wanted == before {
            return Ok(());
        }
        match self.grow_to(wanted).await {
            Ok(()) => {
                tracing::info!(vcpus = wanted.vcpus, mib = wanted.memory >> 20, "the virtual machine has grown");
                Ok(())
            }
            Err(source) => {
                self.shrink(before).await;
                let wanted = format!("{} vCPUs and {} MiB of memory", wanted.vcpus, wanted.memory >> 20);
                Err(Error::Grow { wanted, source: Box::new(source) })
            }
        }
    }

    async fn grow_to(&mut self, wanted: Size) -> Result<(), Error> {
        let before = self.reached;
        if wanted.memory > before.memory {
            self.reached.memory = self.resize_memory(wanted.memory, self.deadline).await?;
            if self.reached.memory < wanted.memory {
                return Err(self.short(wanted));
            }
        }
        if wanted.vcpus > before.vcpus {
            self.reached.vcpus = self.resize_vcpus(wanted.vcpus, self.deadline).await?;
            if self.reached.vcpus < wanted.vcpus {
                return Err(self.short(wanted));
            }
        }
        self.bring_online(wanted).await
    }

    fn short(&self, wanted: Size) -> Error {
        let text = |size: Size| format!("{} vCPUs and {} MiB of memory", size.vcpus, size.memory >> 20);
        Error::Short { reached: text(self.reached), wanted: text(wanted), deadline: self.deadline }
    }

    async fn bring_online(&self, size: Size) -> Result<(), Error> {
        let request = OnlineCpuMemRequest {
            cpus: size.vcpus.into(),
            memory: size.memory,
            deadline_ms: u32::try_from(self.deadline.as_millis()).unwrap_or(u32::MAX),
            ..OnlineCpuMemRequest::default()
        };
        // The guest has the deadline; the answer has to get here.
        let context = ttrpc::context::with_duration(self.deadline + Duration::from_secs(5));
        match self.agent.online_cpu_mem(context, &request).await {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => {
                let code = status.code.enum_value().unwrap_or(ttrpc::Code::UNKNOWN);
                Err(Error::Agent(status.message, code))
            }
            Err(error) => Err(Error::GuestGone(error.to_string())),
        }
    }

    /// Shrinks as far as the guest lets it.
    async fn shrink(&mut self, target: Size) {
        if target.vcpus < self.reached.vcpus {
            match self.resize_vcpus(target.vcpus, SHRINK_DEADLINE).await {
                Ok(reached) => self.reached.vcpus = reached,
                Err(error) => return refused(&error),
            }
        }
        if target.memory < self.reached.memory {
            match self.resize_memory(target.memory, SHRINK_DEADLINE).await {
                Ok(reached) => self.reached.memory = reached,
                Err(error) => return refused(&error),
            }
        }
        let Size { vcpus, memory } = self.reached;
        if self.reached == target {
            tracing::info!(vcpus, mib = memory >> 20, "the virtual machine has shrunk");
        } else {
            let wanted = (target.vcpus, target.memory >> 20);
            tracing::warn!(
                vcpus,
                mib = memory >> 20,
                ?wanted,
                "the virtual machine is larger than its containers need"
            );
        }
    }

    async fn resize_vcpus(&self, count: u8, deadline: Duration) -> Result<u8, Error> {
        let hardware = Arc::clone(&self.hardware);
        self.blocking(move || hardware.resize_vcpus(count, deadline)).await
    }

    async fn resize_memory(&self, bytes: u64, deadline: Duration) -> Result<u64, Error> {
        let hardware = Arc::clone(&self.hardware);
        self.blocking(move || hardware.resize_memory(bytes, deadline)).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        change: impl FnOnce() -> Result<T, ChangeError> + Send + 'static,
    ) -> Result<T, Error> {
        Ok(blocking::run("resize", change).await??)
    }
}

/// Says why a machine does not shrink; one that has ended need not.
fn refused(error: &Error) {
    if !matches!(error, Error::Change(ChangeError::Ended)) {
        tracing::warn!(error = %chain(error), "the virtual machine does not shrink");
    }
}
