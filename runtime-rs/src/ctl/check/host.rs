//! The host: virtualization, devices, kernel modules, cgroups.

use std::path::Path;

use kvm_ioctls::Kvm;

use super::Finding;
use crate::host::cgroup::MOUNT;

/// The one version of KVM's interface that there will be (Documentation/virt/kvm/api.rst, `KVM_GET_API_VERSION`).
const KVM_API: i32 = 12;

pub(super) fn look() -> Vec<Finding> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let modules = Modules::of_this_kernel();
    let mut findings = vec![
        virtualization(cpu_flag(&cpuinfo), modules.loaded("kvm_").as_deref()),
        kvm(&open_kvm()),
        tun(Path::new("/dev/net/tun")),
        traffic_control(&modules),
        vhost_net(Path::new("/dev/vhost-net").exists()),
        cgroups(Path::new(MOUNT).join("cgroup.controllers").exists()),
    ];
    let groups = std::fs::read_dir("/sys/kernel/iommu_groups").is_ok_and(|mut groups| groups.next().is_some());
    findings.push(vfio(groups, Path::new("/dev/vfio/vfio").exists()));
    findings
}

/// The virtualization among the first CPU's flags.
fn cpu_flag(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

/// Whether KVM runs guests by the CPU's own virtualization: that `/dev/kvm` exists says little.
fn virtualization(cpu: Option<&str>, module: Option<&str>) -> Finding {
    const WHAT: &str = "virtualization";
    match (cpu, module) {
        (Some(flag), Some(module @ ("kvm_intel" | "kvm_amd"))) => {
            Finding::ok(WHAT, format!("the CPU has {flag}, and the module {module} uses it"))
        }
        (Some(flag), None) => Finding::error(
            WHAT,
            format!("the CPU has {flag}, but no module of KVM is loaded"),
            format!(
                "modprobe {}, and enable virtualization in the firmware if that fails",
                if flag == "vmx" { "kvm_intel" } else { "kvm_amd" }
            ),
        ),
        (_, Some(module)) => Finding::warning(
            WHAT,
            format!("KVM comes from {module}, no module of a CPU's maker: it emulates, and a guest may not boot"),
            "use a host with VT-x or AMD-V, or a virtual machine with nested virtualization",
        ),
        (None, None) => Finding::error(
            WHAT,
            "the CPU offers neither vmx nor svm",
            "enable virtualization in the firmware, or nested virtualization in the host of this virtual machine",
        ),
    }
}

/// KVM's version, after a virtual machine was made and ended for a trial.
fn open_kvm() -> Result<i32, std::io::Error> {
    let kvm = Kvm::new()?;
    kvm.create_vm()?;
    Ok(kvm.get_api_version())
}

fn kvm(opened: &Result<i32, std::io::Error>) -> Finding {
    const WHAT: &str = "/dev/kvm";
    match opened {
        Ok(KVM_API) => Finding::ok(WHAT, format!("makes virtual machines, version {KVM_API} of its interface")),
        Ok(other) => Finding::error(
            WHAT,
            format!("has version {other} of its interface, not {KVM_API}"),
            "use a kernel from 2.6.22 on",
        ),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Finding::error(
            WHAT,
            "this user may not open it",
            "run `kata-ctl check` as root, as containerd runs the shim",
        ),
        Err(error) => Finding::error(
            WHAT,
            format!("makes no virtual machine: {error}"),
            "load kvm_intel or kvm_amd; in a container, pass the device",
        ),
    }
}

fn tun(path: &Path) -> Finding {
    const WHAT: &str = "taps";
    match std::fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::ok(WHAT, format!("{} can be opened", path.display())),
        Err(error) => Finding::error(
            WHAT,
            format!("{}: {error}; no pod gets a network", path.display()),
            "modprobe tun, and run this as root",
        ),
    }
}

/// What joins a pod's interface to its tap.
fn traffic_control(modules: &Modules) -> Finding {
    const WHAT: &str = "traffic control";
    let missing: Vec<&str> =
        ["sch_ingress", "cls_u32", "act_mirred"].into_iter().filter(|name| modules.has(name) == Some(false)).collect();
    if missing.is_empty() {
        return Finding::ok(WHAT, "the kernel has sch_ingress, cls_u32 and act_mirred");
    }
    let text = format!("the kernel lacks {}; no pod gets a network", missing.join(", "));
    Finding::error(WHAT, text, "install the package with all modules of this kernel")
}

fn vhost_net(exists: bool) -> Finding {
    const WHAT: &str = "vhost-net";
    if exists {
        return Finding::ok(WHAT, "the kernel moves packets between guests and taps");
    }
    Finding::warning(
        WHAT,
        "/dev/vhost-net is missing: pod processes move packets themselves, which is slower",
        "modprobe vhost_net",
    )
}

fn cgroups(unified: bool) -> Finding {
    const WHAT: &str = "cgroups";
    if unified {
        return Finding::ok(WHAT, format!("version 2 at {MOUNT}"));
    }
    Finding::warning(
        WHAT,
        format!("no cgroup v2 at {MOUNT}: pods are in no cgroup of their own, and limits hold in the guest alone"),
        "boot with systemd.unified_cgroup_hierarchy=1",
    )
}

fn vfio(has_groups: bool, loaded: bool) -> Finding {
    const WHAT: &str = "devices of the host";
    match (has_groups, loaded) {
        (true, true) => Finding::ok(WHAT, "there is an IOMMU, and VFIO is loaded"),
        (true, false) => {
            Finding::ok(WHAT, "there is an IOMMU; to give pods devices, modprobe vfio-pci and bind them to it")
        }
        (false, _) => {
            Finding::ok(WHAT, "no IOMMU is in use: pods cannot have any (intel_iommu=on where the host has one)")
        }
    }
}

/// The modules of a kernel.
#[derive(Debug, Default)]
struct Modules {
    /// Loaded ones, and those in the kernel that have parameters.
    present: Vec<String>,
    /// What can be loaded or is in the kernel; nothing where the list cannot be read.
    available: Option<String>,
}

impl Modules {
    fn of_this_kernel() -> Self {
        let entries = std::fs::read_dir("/sys/module").into_iter().flatten().flatten();
        let mut present: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        present.sort();
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let lists =
            ["modules.dep", "modules.builtin"].map(|name| Path::new("/lib/modules").join(release.trim()).join(name));
        let texts: Vec<String> = lists.iter().filter_map(|list| std::fs::read_to_string(list).ok()).collect();
        Self { present, available: Some(texts.concat()).filter(|text| !text.is_empty()) }
    }

    /// The first loaded module whose name begins like this.
    fn loaded(&self, prefix: &str) -> Option<String> {
        self.present.iter().find(|name| name.starts_with(prefix)).cloned()
    }

    /// Whether the kernel has a module; nothing where that cannot be told.
    fn has(&self, name: &str) -> Option<bool> {
        if self.present.iter().any(|present| present == name) {
            return Some(true);
        }
        let file = format!("/{name}.ko");
        self.available.as_ref().map(|text| text.contains(&file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::check::Level;

    #[test]
    fn only_the_makers_module_on_a_cpu_with_virtualization_is_well() {
        for (cpu, module, level) in [
            (Some("vmx"), Some("kvm_intel"), Level::Ok),
            (Some("svm"), Some("kvm_amd"), Level::Ok),
            (Some("svm"), None, Level::Error),
            (None, Some("kvm_pvm"), Level::Warning),
            (Some("vmx"), Some("kvm_pvm"), Level::Warning),
            (None, None, Level::Error),
        ] {
            let finding = virtualization(cpu, module);
            assert_eq!(finding.level, level, "{finding}");
            assert_eq!(finding.remedy.is_none(), level == Level::Ok);
        }
        assert_eq!(cpu_flag("processor: 0\nflags\t\t: fpu svm_lock svm\n"), Some("svm"));
        assert_eq!(cpu_flag("flags : fpu svm_lock\n"), None);
    }

    #[test]
    fn kvm_is_judged_by_what_it_does() {
        let error = |kind: std::io::ErrorKind| Err(kind.into());
        assert_eq!(kvm(&Ok(12)).level, Level::Ok);
        assert_eq!(kvm(&Ok(11)).level, Level::Error);
        assert!(kvm(&error(std::io::ErrorKind::PermissionDenied)).remedy.unwrap().contains("as root"));
        assert!(kvm(&error(std::io::ErrorKind::NotFound)).remedy.unwrap().contains("kvm_intel"));
    }

    #[test]
    fn a_module_is_missing_only_where_the_list_says_so() {
        let list = "kernel/net/sched/act_mirred.ko.xz:\nkernel/net/sched/sch_ingress.ko:\n".to_owned();
        let known = Modules { present: vec!["cls_u32".to_owned()], available: Some(list) };
        assert_eq!(traffic_control(&known).level, Level::Ok);
        let lacking = Modules { available: Some("kernel/net/sched/act_mirred.ko:\n".to_owned()), ..Modules::default() };
        let finding = traffic_control(&lacking);
        assert!(finding.level == Level::Error && finding.text.contains("sch_ingress, cls_u32"), "{finding}");
        assert_eq!(traffic_control(&Modules::default()).level, Level::Ok);
    }
}
