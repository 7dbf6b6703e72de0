//! What a container may do.

use anyhow::{Result, ensure};

use super::{forever, run_pod};
use crate::context::Context;
use crate::cri::api::security_profile::ProfileType;
use crate::cri::api::{Capability, Int64Value, SecurityProfile};
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: a container runs as the user and with the groups that it was given", user).with_pods(),
    Case::any("cri: a container has the capabilities that it was given, and no others", capabilities).with_pods(),
    Case::any("cri: a container whose root is read-only cannot write to it", readonly).with_pods(),
    Case::any("cri: a container that may gain no privileges is told so", no_new_privileges).with_pods(),
    Case::any("cri: paths that are masked or read-only are so", paths).with_pods(),
    Case::any("cri: the runtime's own seccomp profile filters, and none does not", seccomp).with_pods(),
    Case::any("cri: a privileged container may do what others may not", privileged).with_pods(),
];

fn user(context: &Context) -> Result<()> {
    let pod = run_pod(context, "user")?;
    let mut spec = forever("one");
    let security = spec.security();
    security.run_as_user = Some(Int64Value { value: 1234 });
    security.run_as_group = Some(Int64Value { value: 2345 });
    security.supplemental_groups = vec![3456, 4567];
    let container = pod.run(spec)?;
    ensure!(container.shell("id -u; id -g")? == "1234\n2345\n");
    let groups = container.shell("id -G")?;
    ensure!(
        ["2345", "3456", "4567"].iter().all(|group| groups.split_whitespace().any(|one| one == *group)),
        "{groups}"
    );
    pod.remove()
}

/// A line of `/proc/self/status` of a container's shell.
const EFFECTIVE: &str = "sed -n 's/^CapEff:\\t//p' /proc/self/status";

fn capabilities(context: &Context) -> Result<()> {
    let pod = run_pod(context, "capabilities")?;
    let mut few = forever("few");
    few.security().capabilities = Some(Capability {
        drop_capabilities: vec!["ALL".to_owned()],
        add_capabilities: vec!["NET_ADMIN".to_owned()],
        ..Capability::default()
    });
    let few = pod.run(few)?;
    // CAP_NET_ADMIN is number 12 (linux/capability.h).
    ensure!(few.shell(EFFECTIVE)?.trim() == format!("{:016x}", 1 << 12), "{}", few.shell(EFFECTIVE)?);
    few.shell("ip link add dummy type bridge && ip link del dummy")?;
    let usual = pod.run(forever("usual"))?;
    let refused = usual.exec(&["ip", "link", "add", "dummy", "type", "bridge"], 0)?;
    ensure!(refused.exit_code != 0, "{refused:?}");
    pod.remove()
}

fn readonly(context: &Context) -> Result<()> {
    let pod = run_pod(context, "readonly")?;
    let mut spec = forever("one");
    spec.security().readonly_rootfs = true;
    let container = pod.run(spec)?;
    let refused = container.exec(&["touch", "/file"], 0)?;
    ensure!(refused.exit_code != 0 && String::from_utf8_lossy(&refused.stderr).contains("Read-only"), "{refused:?}");
    container.shell("touch /dev/shm/file")?;
    pod.remove()
}

fn no_new_privileges(context: &Context) -> Result<()> {
    let pod = run_pod(context, "privileges")?;
    for (name, asked, told) in [("may", false, "0\n"), ("may-not", true, "1\n")] {
        let mut spec = forever(name);
        spec.security().no_new_privs = asked;
        let container = pod.run(spec)?;
        let found = container.shell("sed -n 's/^NoNewPrivs:\\t//p' /proc/self/status")?;
        ensure!(found == told, "{name}: {found}");
    }
    pod.remove()
}

fn paths(context: &Context) -> Result<()> {
    let pod = run_pod(context, "paths")?;
    let mut spec = forever("one");
    spec.security().masked_paths = vec!["/proc/version".to_owned(), "/proc/tty".to_owned()];
    spec.security().readonly_paths = vec!["/proc/sys".to_owned()];
    let container = pod.run(spec)?;
    ensure!(container.shell("cat /proc/version; ls /proc/tty")?.is_empty());
    let refused = container.exec(&["sh", "-c", "echo 1 > /proc/sys/kernel/domainname"], 0)?;
    ensure!(refused.exit_code != 0, "{refused:?}");
    pod.remove()
}

fn seccomp(context: &Context) -> Result<()> {
    let pod = run_pod(context, "seccomp")?;
    for (kind, mode) in [(ProfileType::RuntimeDefault, "2\n"), (ProfileType::Unconfined, "0\n")] {
        let mut spec = forever(kind.as_str_name());
        spec.security().seccomp = Some(SecurityProfile { profile_type: kind.into(), ..SecurityProfile::default() });
        let container = pod.run(spec)?;
        let found = container.shell("sed -n 's/^Seccomp:\\t//p' /proc/self/status")?;
        ensure!(found == mode, "{kind:?}: {found}");
    }
    pod.remove()
}

fn privileged(context: &Context) -> Result<()> {
    let mut asked = super::spec(context, "privileged");
    asked.linux().security_context.get_or_insert_default().privileged = true;
    let pod = context.cri.run_pod(asked)?;
    let mut spec = forever("one");
    spec.security().privileged = true;
    let container = pod.run(spec)?;
    container.shell("mkdir /mnt; mount -t tmpfs tmpfs /mnt && touch /mnt/file && umount /mnt")?;
    pod.remove()
}
