//! The Setup request: makes the guest the sandbox that the host described.

use std::fs;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use protocols::agent::{Dns, SetupRequest, SetupResponse, UpdateNetworkRequest};
use protocols::dns;

use crate::boot;
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::network::{self, Applied};
use crate::resolver::Resolver;
use crate::sys;
use crate::timeline;

/// The guest image's /etc/resolv.conf leads here.
const RESOLV_CONF: &str = "/run/resolv.conf";
/// Longest host name of Linux (uts_namespace(7)).
const HOSTNAME_LENGTH: usize = 64;
/// Sysctls that one request may set.
const SYSCTLS: usize = 1024;
/// Bytes of entropy that one request may bring.
const ENTROPY: usize = 64;

impl Guest {
    /// Does everything that one Setup request asks for; stops at the first part that fails.
    pub(crate) fn setup(self: &Rc<Self>, request: &SetupRequest) -> Result<SetupResponse> {
        let received_ns = timeline::now_ns();
        set_clock(request.realtime_ns)?;
        add_entropy(&request.entropy)?;
        set_hostname(&request.hostname)?;
        write_resolv_conf(request.dns.as_ref())?;
        network::configure(&request.interfaces, &request.routes, &request.neighbours)?;
        *self.network.borrow_mut() = Applied::new(&request.interfaces, &request.routes, &request.neighbours);
        set_sysctls(request)?;
        limit_shared_memory(request.shm_size)?;
        self.storages.borrow_mut().add_storages(&request.storages)?;
        if request.debug_console {
            self.open_debug_console();
        }
        self.timeline.borrow_mut().stamp("setup done");
        Ok(SetupResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: kernel_release(),
            stamps: self.timeline.borrow().stamps(),
            received_ns,
            answered_ns: timeline::now_ns(),
            ..Default::default()
        })
    }
}

impl Guest {
    /// Makes the network what the request says. The links of new cards are waited for.
    pub(crate) async fn update_network(&self, request: &UpdateNetworkRequest) -> Result<()> {
        network::await_links(&request.interfaces, Duration::from_millis(request.deadline_ms.into())).await?;
        let wanted = Applied::new(&request.interfaces, &request.routes, &request.neighbours);
        self.network.borrow_mut().change(wanted)?;
        let mut resolver = self.resolver.borrow_mut();
        match (request.resolver, resolver.is_some()) {
            (true, false) => *resolver = Some(Resolver::start(&self.endpoint)?),
            (false, true) => *resolver = None,
            _ => {}
        }
        Ok(())
    }
}

fn set_clock(realtime_ns: i64) -> Result<()> {
    if realtime_ns <= 0 {
        return Ok(());
    }
    let time = TimeSpec::new(realtime_ns / 1_000_000_000, realtime_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(Error::io("cannot set the clock"))
}

fn add_entropy(bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    if bytes.len() > ENTROPY {
        return Err(Error::invalid(format!("{} bytes of entropy: the limit is {ENTROPY}", bytes.len())));
    }
    let mut pool = [0; ENTROPY];
    pool[..bytes.len()].copy_from_slice(bytes);
    let failed = "cannot add entropy";
    let random = fs::OpenOptions::new().write(true).open("/dev/random").map_err(Error::io(failed))?;
    sys::add_entropy(&random, &pool, bytes.len()).map_err(Error::io(failed))
}

fn set_hostname(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    if name.len() > HOSTNAME_LENGTH {
        return Err(Error::invalid(format!("hostname {name:?}: the limit is {HOSTNAME_LENGTH} bytes")));
    }
    nix::unistd::sethostname(name).map_err(Error::io("cannot set the hostname"))
}

fn limit_shared_memory(size: u64) -> Result<()> {
    if size == 0 {
        return Ok(());
    }
    let options = format!("size={size}");
    mount(None::<&str>, boot::SHARED_MEMORY, None::<&str>, MsFlags::MS_REMOUNT | boot::NO_DEVICES, Some(&*options))
        .map_err(Error::io(format!("cannot make {} {size} bytes large", boot::SHARED_MEMORY)))
}

fn write_resolv_conf(dns: Option<&Dns>) -> Result<()> {
    let Some(dns) = dns else { return Ok(()) };
    let text = dns::resolv_conf(dns).map_err(Error::invalid)?;
    fs::write(RESOLV_CONF, text).map_err(Error::io(format!("cannot write {RESOLV_CONF}")))
}

fn set_sysctls(request: &SetupRequest) -> Result<()> {
    if request.sysctls.len() > SYSCTLS {
        return Err(Error::invalid(format!("{} sysctls: the limit is {SYSCTLS}", request.sysctls.len())));
    }
    let mut sysctls: Vec<_> = request.sysctls.iter().collect();
    sysctls.sort();
    sysctls.into_iter().try_for_each(|(name, value)| {
        write_sysctl(name, value).map_err(Error::io(format!("cannot set sysctl {name} to {value:?}")))
    })
}

/// Sets one sysctl of the guest, named with dots or slashes (sysctl(8)).
pub(crate) fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    let path =
        sysctl_path(name).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no sysctl has such a name"))?;
    fs::write(Path::new("/proc/sys").join(path), value)
}

/// As sysctl(8): the separator that comes first is the separator, and the other one stands for it inside a part.
fn sysctl_path(name: &str) -> Option<String> {
    let dotted = name.find(['.', '/']).is_some_and(|at| name.as_bytes()[at] == b'.');
    let path: String = if dotted {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect()
    } else {
        name.to_owned()
    };
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    path.split('/').all(plain).then_some(path)
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| String::new(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_stay_below_proc_sys() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").as_deref(), Some("net/ipv4/ip_forward"));
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/forwarding").as_deref(), Some("net/ipv4/conf/eth0.1/forwarding"));
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.forwarding").as_deref(), Some("net/ipv4/conf/eth0.1/forwarding"));
        for bad in ["", "/etc/passwd", "..", "net/../../etc/passwd", "net...x", "a//b", "a.\0"] {
            assert_eq!(sysctl_path(bad), None, "{bad:?} must be refused");
        }
    }
}
