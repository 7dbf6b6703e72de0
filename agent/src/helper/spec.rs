//! Fits an OCI specification to the guest: what it leaves to the agent, and what a guest kernel has not.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use libcontainer::apparmor;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxNamespaceType, Process, Root, Spec};
use pathrs::flags::OpenFlags;

use super::{Create, Error, Stage};
use crate::cgroup::Cgroup;

/// Largest /etc/passwd that is searched for a home directory.
const PASSWD_LIMIT: u64 = 1 << 20;

/// Makes a specification that libcontainer can run in this guest.
pub(super) fn adapt(spec: &mut Spec, container: &Create) -> Result<(), Error> {
    if let Some(path) = container.rootfs.clone() {
        let mut root = Root::default();
        root.set_readonly(spec.root().as_ref().and_then(Root::readonly));
        root.set_path(path);
        spec.set_root(Some(root));
    }
    let root = spec.root().as_ref().ok_or("the spec has no root and the request no rootfs mount")?.path().clone();
    if !has_namespace(spec, LinuxNamespaceType::Uts) {
        // The guest's name is the sandbox's; it came with Setup.
        spec.set_hostname(None).set_domainname(None);
    }
    apply_sandbox_sysctls(spec)?;
    let linux = spec.linux_mut().as_mut().ok_or("the spec has no linux section")?;
    linux.set_cgroups_path(Some(Cgroup::oci_path(&container.id)));
    if let Some(path) = &container.pid_namespace {
        let namespaces = linux.namespaces_mut().iter_mut().flatten();
        for namespace in namespaces.filter(|namespace| namespace.typ() == LinuxNamespaceType::Pid) {
            namespace.set_path(Some(path.clone()));
        }
    }
    let process = spec.process_mut().as_mut().ok_or("the spec has no process")?;
    adapt_process(process, &root, container.stdio.console.is_some());
    Ok(())
}

/// The same for one process whose root directory is `root`. Whether it has a terminal is for the request to say.
pub(super) fn adapt_process(process: &mut Process, root: &Path, terminal: bool) {
    process.set_terminal(Some(terminal));
    if !apparmor::is_enabled().unwrap_or(false) {
        process.set_apparmor_profile(None);
    }
    process.set_selinux_label(None);
    // libcontainer takes `false` for "as late as possible" and then lacks the capability to install a seccomp filter.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // Otherwise libcontainer asks the C library, which may load a name service module from the container's files.
    let home = home_directory(root, process.user().uid());
    let env = process.env_mut().get_or_insert_default();
    env.retain(|entry| entry != "HOME=");
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={home}"));
    }
}

/// A container without a namespace of its own shares the guest's, which is its sandbox's: such sysctls are set there.
/// libcontainer would refuse them, as a runtime on a shared host must.
fn apply_sandbox_sysctls(spec: &mut Spec) -> Result<(), Error> {
    let shares_net = !has_namespace(spec, LinuxNamespaceType::Network);
    let shares_ipc = !has_namespace(spec, LinuxNamespaceType::Ipc);
    let Some(sysctls) = spec.linux_mut().as_mut().and_then(|linux| linux.sysctl_mut().as_mut()) else { return Ok(()) };
    let mut outcome = Ok(());
    sysctls.retain(|name, value| {
        let of_net = name.starts_with("net.") || name.starts_with("net/");
        let of_ipc = name.starts_with("kernel.") || name.starts_with("fs.mqueue.");
        let ours = (of_net && shares_net) || (of_ipc && shares_ipc);
        if ours && let Err(error) = crate::setup::write_sysctl(name, value) {
            outcome = Err(error.into());
        }
        !ours
    });
    outcome
}

/// The devices that the container may use.
pub(super) fn device_rules(spec: &Spec) -> Vec<LinuxDeviceCgroup> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    resources.and_then(|resources| resources.devices().clone()).unwrap_or_default()
}

/// Which hooks the agent has to ask for later.
pub(super) fn hook_stages(spec: &Spec) -> Vec<Stage> {
    let Some(hooks) = spec.hooks() else { return Vec::new() };
    let some = |hooks: &Option<Vec<_>>| hooks.as_ref().is_some_and(|hooks: &Vec<_>| !hooks.is_empty());
    let mut stages = Vec::new();
    if some(hooks.poststart()) {
        stages.push(Stage::Poststart);
    }
    if some(hooks.poststop()) {
        stages.push(Stage::Poststop);
    }
    stages
}

/// The user of the first process, as the guest numbers it.
pub(super) fn host_uid(spec: &Spec) -> u32 {
    map_uid(spec, spec.process().as_ref().map_or(0, |process| process.user().uid()))
}

/// A user id of the container, as the guest numbers it (user_namespaces(7)).
pub(super) fn map_uid(spec: &Spec, uid: u32) -> u32 {
    let mappings = spec.linux().as_ref().and_then(|linux| linux.uid_mappings().as_deref()).unwrap_or_default();
    let mapped = mappings.iter().find_map(|mapping| {
        let offset = uid.checked_sub(mapping.container_id()).filter(|offset| *offset < mapping.size())?;
        mapping.host_id().checked_add(offset)
    });
    mapped.unwrap_or(uid)
}

fn has_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().any(|namespace| namespace.typ() == kind)
}

/// The home directory that the container's own /etc/passwd gives a user; `/` without one, as runc has it.
fn home_directory(root: &Path, uid: u32) -> String {
    read_passwd(root).ok().and_then(|passwd| home_of(&passwd, uid)).unwrap_or_else(|| "/".into())
}

/// Resolved inside the container's root: its symlinks are its own affair.
fn read_passwd(root: &Path) -> io::Result<String> {
    let handle = pathrs::Root::open(root).and_then(|root| root.open_subpath("etc/passwd", OpenFlags::O_RDONLY));
    let file: fs::File = handle.map_err(io::Error::other)?;
    let mut text = String::new();
    file.take(PASSWD_LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

fn home_of(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = fields.nth(2)?;
        let home = fields.nth(2)?;
        (id.parse() == Ok(uid) && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxIdMappingBuilder;

    #[test]
    fn home_comes_from_the_containers_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:33::/var/www:/bin/false\nnone:x:5:5:::\n";
        assert_eq!(home_of(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_of(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_of(passwd, 5), None);
        assert_eq!(home_of(passwd, 1000), None);
    }

    #[test]
    fn user_ids_are_mapped_through_the_user_namespace() {
        let mut spec = Spec::default();
        assert_eq!(map_uid(&spec, 33), 33);
        let mapping = LinuxIdMappingBuilder::default()
            .container_id(0u32)
            .host_id(100_000u32)
            .size(10u32)
            .build()
            .expect("mapping");
        if let Some(linux) = spec.linux_mut() {
            linux.set_uid_mappings(Some(vec![mapping]));
        }
        assert_eq!(map_uid(&spec, 9), 100_009);
        assert_eq!(map_uid(&spec, 10), 10, "outside of the mapping");
    }
}
