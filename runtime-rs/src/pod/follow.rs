//! Follows a network namespace of the pod's own: what comes to it while the machine runs, the guest gets.
//!
//! docker and some CNI runtimes have a container made first, and then put interfaces into the network namespace of its
//! process, which is this one; more come and go while the container runs. One task follows, one change at a time: the kernel
//! tells that something has changed, and the whole namespace is compared with what the guest was told. An interface that
//! is new gets a card, one that is gone has its card taken, and then the guest is told all that there is.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use journal::EffectId;
use network::{Interface, Namespace, News, Scan};
use protocols::agent::UpdateNetworkRequest;
use protocols::containerd::ttrpc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use super::sandbox::{self, Sandbox};
use super::{Pod, containers, resolver};
use crate::error::{Error, chain};
use crate::host::blocking;
use crate::network::{Joined, Network, join, mac_text};

/// Changes that are this close to each other belong together: name, addresses and routes of an interface come one by one.
const TOGETHER: Duration = Duration::from_millis(50);
/// Changes that do not end are followed after this.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the guest gets to let a card go.
const REMOVE_DEADLINE: Duration = Duration::from_secs(10);
/// What the guest may take beyond the time in which it waits for its links.
const GRACE: Duration = Duration::from_secs(10);
/// Starts that wait for the network at once.
const QUEUE: usize = 16;

/// Somebody who waits until the guest has all that the namespace has.
type Order = oneshot::Sender<Result<(), Error>>;

/// Asks the task. The task ends when this is dropped, or with the machine.
#[derive(Debug)]
pub struct Follower(mpsc::Sender<Order>);

impl Follower {
    /// Follows this process's own network namespace, which is not the host's. `pluggable` is whether cards can come.
    ///
    /// # Errors
    ///
    /// [`Error::Network`] when the namespace cannot be watched.
    pub async fn start(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>, pluggable: bool) -> Result<Self, Error> {
        let path = PathBuf::from(format!("/proc/{}/ns/net", std::process::id()));
        let open = move || {
            let namespace = Namespace::open(&path)?;
            let news = namespace.news()?;
            Ok::<_, Error>((namespace, news))
        };
        let (namespace, news) = blocking::run("follow", open).await??;
        let readiness = sandbox::watch(news.as_fd()).map_err(Error::host("watch", "the network of the pod"))?;
        let (sender, orders) = mpsc::channel(QUEUE);
        let task = Task {
            pod: Arc::clone(pod),
            sandbox: Arc::clone(sandbox),
            namespace: Arc::new(Mutex::new(namespace)),
            news,
            readiness,
            stale: AtomicBool::new(false),
            pluggable,
            cards: Vec::new(),
            told: UpdateNetworkRequest::default(),
            resolver: false,
        };
        tokio::spawn(task.run(orders));
        Ok(Self(sender))
    }

    /// Returns when the guest has all that the namespace has now.
    ///
    /// # Errors
    ///
    /// Why it does not: [`Error::NoRoom`], [`Error::Change`], those of [`join`], or the agent's answer.
    pub async fn catch_up(&self) -> Result<(), Error> {
        let gone = || Error::GuestGone("nothing follows its network any more".to_owned());
        let (reply, answer) = oneshot::channel();
        self.0.send(reply).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A card of the machine and the interface that it stands for.
#[derive(Debug)]
struct Card {
    /// The interface's number and hardware address: another of either is another interface.
    identity: (u32, [u8; 6]),
    /// The card's own name.
    name: String,
    tap: String,
    effect: EffectId,
}

/// What the task knows.
struct Task {
    pod: Arc<Pod>,
    sandbox: Arc<Sandbox>,
    namespace: Arc<Mutex<Namespace>>,
    news: News,
    /// The same socket as `news`, for the event loop.
    readiness: AsyncFd<OwnedFd>,
    /// News were taken and not followed yet.
    stale: AtomicBool,
    pluggable: bool,
    cards: Vec<Card>,
    told: UpdateNetworkRequest,
    /// Whether the guest's questions for names are answered.
    resolver: bool,
}

impl Task {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let sandbox = Arc::clone(&self.sandbox);
        loop {
            let order = tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => Some(order),
                    None => return,
                },
                changed = self.changed() => match changed {
                    Ok(()) => None,
                    Err(error) => {
                        tracing::warn!(%error, "the pod's network is not followed any more");
                        return;
                    }
                },
                _ = sandbox.ended() => return,
            };
            let followed = self.follow().await;
            match order {
                // Whoever gave up needs no answer.
                Some(order) => drop(order.send(followed)),
                None => {
                    if let Err(error) = followed {
                        tracing::warn!(error = %chain(&error), "a change of the pod's network did not reach the guest");
                    }
                }
            }
        }
    }

    /// Returns when something has changed and nothing more comes with it.
    async fn changed(&self) -> std::io::Result<()> {
        self.heard().await?;
        let settled = async {
            while let Ok(heard) = tokio::time::timeout(TOGETHER, self.heard()).await {
                heard?;
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, settled).await.unwrap_or(Ok(()))
    }

    async fn heard(&self) -> std::io::Result<()> {
        let take = |_: &OwnedFd| if self.news.take()? { Ok(()) } else { Err(std::io::ErrorKind::WouldBlock.into()) };
        self.readiness.async_io(Interest::READABLE, take).await?;
        self.stale.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Brings the guest up to date, if there was any change.
    async fn follow(&mut self) -> Result<(), Error> {
        let heard = self.news.take().map_err(Error::host("hear of changes of", "the pod's network"))?;
        if !self.stale.swap(false, Ordering::Relaxed) && !heard {
            return Ok(());
        }
        let pod = Arc::clone(&self.pod);
        let _inside = pod.gate.enter().await?;
        let updated = pod.gate.unless_closed(self.update()).await;
        if updated.is_err() {
            // The next look does it again.
            self.stale.store(true, Ordering::Relaxed);
        }
        updated
    }

    async fn update(&mut self) -> Result<(), Error> {
        let (scan, resolver) = self.look().await?;
        if resolver && !self.resolver {
            resolver::serve(&self.pod)?;
            self.resolver = true;
        }
        self.let_go(&scan).await;
        for interface in &scan.interfaces {
            if !self.cards.iter().any(|card| card.identity == identity(interface)) {
                self.plug(interface).await?;
            }
        }
        let wanted = wanted(&scan, resolver);
        if wanted != self.told { self.tell(wanted).await } else { Ok(()) }
    }

    /// What the namespace has but for the taps of this process, and whether it resolves names as docker does.
    async fn look(&self) -> Result<(Scan, bool), Error> {
        let namespace = Arc::clone(&self.namespace);
        let taps: Vec<String> = self.cards.iter().map(|card| card.tap.clone()).collect();
        let look = move || {
            let mut namespace = lock(&namespace);
            let mut scan = namespace.scan()?;
            scan.interfaces.retain(|interface| !taps.contains(&interface.name));
            let resolver = namespace.serves(RESOLVER)?;
            Ok((scan, resolver))
        };
        blocking::run("scan", look).await?
    }

    /// Gives the machine a card for a new interface.
    async fn plug(&mut self, interface: &Interface) -> Result<(), Error> {
        if !self.pluggable {
            return Err(Error::NoRoom(interface.name.clone()));
        }
        let (identity, interface) = (identity(interface), interface.clone());
        let name = format!("{}-{}", interface.name, interface.index);
        let (pod, namespace, hardware) = (Arc::clone(&self.pod), Arc::clone(&self.namespace), self.sandbox.hardware());
        let (card_name, deadline) = (name.clone(), self.sandbox.create_timeout);
        let plugged = blocking::run("plug", move || {
            let Joined { card, tap, effect } = join(&mut lock(&namespace), &interface, &pod.journal)?;
            match hardware.add_card(&card_name, &card, deadline) {
                Ok(()) => Ok(Card { identity, name: card_name, tap, effect }),
                Err(error) => {
                    if let Err(failure) = pod.journal.undo(effect) {
                        tracing::warn!(%failure, "left until the end of the sandbox");
                    }
                    Err(Error::from(error))
                }
            }
        });
        let card = plugged.await??;
        tracing::info!(card = name, "an interface of the pod's network came to the guest");
        self.cards.push(card);
        Ok(())
    }

    /// Takes the cards of interfaces that are gone. One that the guest does not let go is tried again with the next change.
    async fn let_go(&mut self, scan: &Scan) {
        let stays = |card: &Card| scan.interfaces.iter().any(|interface| identity(interface) == card.identity);
        let (stay, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.cards).into_iter().partition(stays);
        self.cards = stay;
        if gone.is_empty() {
            return;
        }
        if let Err(error) = self.tell(without(&self.told, &gone)).await {
            tracing::warn!(error = %chain(&error), "the guest does not know that an interface goes");
        }
        for card in gone {
            let (hardware, name) = (self.sandbox.hardware(), card.name.clone());
            let removed = blocking::run("unplug", move || hardware.remove_card(&name, REMOVE_DEADLINE)).await;
            match removed.and_then(|removed| removed.map_err(Error::from)) {
                Ok(()) => {
                    containers::undo(&self.pod, vec![card.effect]).await;
                    tracing::info!(card = card.name, "an interface of the pod's network is gone from the guest");
                }
                Err(error) => {
                    tracing::warn!(card = card.name, error = %chain(&error), "the card of a gone interface stays");
                    self.cards.push(card);
                }
            }
        }
    }

    async fn tell(&mut self, wanted: UpdateNetworkRequest) -> Result<(), Error> {
        let deadline = self.sandbox.create_timeout;
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let request = UpdateNetworkRequest { deadline_ms, ..wanted.clone() };
        let context = ttrpc::context::with_duration(deadline + GRACE);
        let told = self.sandbox.agent.update_network(context, &request).await;
        told.map_err(|error| self.sandbox.explain(error))?;
        self.told = wanted;
        Ok(())
    }
}

/// Where docker resolves names.
const RESOLVER: Ipv4Addr = protocols::RESOLVER;

fn lock(namespace: &Mutex<Namespace>) -> MutexGuard<'_, Namespace> {
    namespace.lock().unwrap_or_else(PoisonError::into_inner)
}

fn identity(interface: &Interface) -> (u32, [u8; 6]) {
    (interface.index, interface.mac)
}

fn wanted(scan: &Scan, resolver: bool) -> UpdateNetworkRequest {
    let Network { interfaces, routes, neighbours, .. } = Network::of(scan);
    UpdateNetworkRequest { interfaces, routes, neighbours, resolver, ..UpdateNetworkRequest::default() }
}

/// What is left of `told` without the interfaces of `gone`.
fn without(told: &UpdateNetworkRequest, gone: &[Card]) -> UpdateNetworkRequest {
    let mut left = told.clone();
    let is_gone = |mac: &str| gone.iter().any(|card| mac_text(card.identity.1) == mac);
    left.interfaces.retain(|interface| !is_gone(&interface.mac));
    let stays = |name: &str| left.interfaces.iter().any(|interface| interface.name == name);
    left.routes.retain(|route| stays(&route.interface));
    left.neighbours.retain(|neighbour| stays(&neighbour.interface));
    left
}

#[cfg(test)]
mod tests {
    use journal::{Effect, Journal};
    use network::Route;

    use super::*;

    #[test]
    fn what_is_gone_goes_with_its_routes_and_the_rest_stays() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::create(&directory.path().join("journal")).unwrap();
        let effect = journal.record(Effect::File { path: directory.path().join("none") }).unwrap();
        let interface = |index: u32, name: &str| Interface {
            index,
            name: name.to_owned(),
            mac: [2, 0, 0, 0, 0, 8],
            mtu: 1500,
            addresses: Vec::new(),
        };
        let one = Interface { mac: [2, 0, 0, 0, 0, 7], ..interface(7, "eth0") };
        let route = |name: &str| Route { interface: name.to_owned(), ..Route::default() };
        let scan = Scan {
            interfaces: vec![one.clone(), interface(8, "eth1")],
            routes: vec![route("eth0"), route("eth1")],
            neighbours: Vec::new(),
        };
        let card = Card { identity: identity(&one), name: "veth7-7".to_owned(), tap: "tap0_kata".to_owned(), effect };
        let left = without(&wanted(&scan, true), &[card]);
        assert_eq!(left.interfaces.iter().map(|left| left.name.as_str()).collect::<Vec<_>>(), ["eth1"]);
        assert_eq!(left.routes.iter().map(|left| left.interface.as_str()).collect::<Vec<_>>(), ["eth1"]);
        assert!(left.resolver);
    }
}
