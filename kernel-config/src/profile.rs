//! Profiles: which fragments make one kernel.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::fragment::{Error, Fragment, Request, Value};

/// A kernel that can be built.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// The kernel of every pod: all drivers built in, no modules
    Base,
    /// For pods with devices of their own: base plus modules, DRM, NVMe and UIO
    Gpu,
    /// For the lab's own machine: base plus KVM, VFIO and IOMMUFD
    Lab,
    /// The peer that benchmarks compare base with; nothing runs on it otherwise
    Reference,
}

/// What Kconfig starts from before the requests are applied.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Start {
    /// Everything off that is not asked for (`allnoconfig` with `KCONFIG_ALLCONFIG`).
    AllOff,
    /// `tinyconfig`, then Kconfig's defaults for what the requests make visible (`olddefconfig`).
    Tiny,
}

/// A request and the fragment that it stands in.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Name of the fragment.
    pub fragment: String,
    /// The request.
    pub request: Request,
}

const BASE: &[(&str, &str)] = &[
    ("build", include_str!("../fragments/build.toml")),
    ("machine", include_str!("../fragments/machine.toml")),
    ("memory", include_str!("../fragments/memory.toml")),
    ("security", include_str!("../fragments/security.toml")),
    ("virtio", include_str!("../fragments/virtio.toml")),
    ("filesystems", include_str!("../fragments/filesystems.toml")),
    ("containers", include_str!("../fragments/containers.toml")),
    ("syscalls", include_str!("../fragments/syscalls.toml")),
    ("network", include_str!("../fragments/network.toml")),
];
const ONLY_BASE: (&str, &str) = ("monolithic", include_str!("../fragments/monolithic.toml"));
const ONLY_GPU: (&str, &str) = ("gpu", include_str!("../fragments/gpu.toml"));
const ONLY_LAB: (&str, &str) = ("lab", include_str!("../fragments/lab.toml"));
const REFERENCE: &str = include_str!("../fragments/reference.config");

impl Profile {
    /// All profiles.
    pub const ALL: [Self; 4] = [Self::Base, Self::Gpu, Self::Lab, Self::Reference];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Gpu => "gpu",
            Self::Lab => "lab",
            Self::Reference => "reference",
        }
    }

    /// What its configuration starts from.
    #[must_use]
    pub fn start(self) -> Start {
        match self {
            Self::Base | Self::Gpu | Self::Lab => Start::AllOff,
            Self::Reference => Start::Tiny,
        }
    }

    /// Largest `vmlinux` that a build of it may give, in bytes: a pod's kernel is part of its footprint.
    #[must_use]
    pub fn size_limit(self) -> Option<u64> {
        (self == Self::Base).then_some(20_000_000)
    }

    /// Its fragments, in the order that they are read.
    ///
    /// # Errors
    /// When one of the data files is not well formed.
    pub fn fragments(self) -> Result<Vec<Fragment>, Error> {
        let own = match self {
            Self::Base => ONLY_BASE,
            Self::Gpu => ONLY_GPU,
            Self::Lab => ONLY_LAB,
            Self::Reference => return Ok(vec![reference()]),
        };
        BASE.iter().copied().chain([own]).map(|(name, text)| Fragment::parse(name, text)).collect()
    }

    /// Its requests by symbol.
    ///
    /// # Errors
    /// As [`Profile::fragments`], and [`Error::Duplicate`].
    pub fn requests(self) -> Result<BTreeMap<String, Origin>, Error> {
        merge(self.fragments()?)
    }
}

fn merge(fragments: Vec<Fragment>) -> Result<BTreeMap<String, Origin>, Error> {
    let mut requests: BTreeMap<String, Origin> = BTreeMap::new();
    for fragment in fragments {
        for (symbol, request) in fragment.symbols {
            let origin = Origin { fragment: fragment.name.clone(), request };
            if let Some(first) = requests.get(&symbol) {
                let (first, second) = (first.fragment.clone(), fragment.name);
                return Err(Error::Duplicate { symbol, first, second });
            }
            requests.insert(symbol, origin);
        }
    }
    Ok(requests)
}

/// The peer's symbols are taken as they come, in the kernel's own format; their reason is that the peer has them.
fn reference() -> Fragment {
    let set = REFERENCE.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('='));
    let symbols = set.map(|(symbol, value)| {
        let value = value.parse().map_or_else(|_| Value::Text(value.to_owned()), Value::Number);
        (symbol.to_owned(), Request { value, reason: "part of the benchmark's peer".to_owned() })
    });
    Fragment {
        name: "reference".to_owned(),
        about: "A guest kernel as it is usually put together, the benchmark's peer".to_owned(),
        symbols: symbols.collect(),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(Profile::Base)]
    #[case(Profile::Gpu)]
    #[case(Profile::Lab)]
    #[case(Profile::Reference)]
    fn a_profile_reads_without_error_and_asks_for_the_boot_path(#[case] profile: Profile) {
        let requests = profile.requests().unwrap();
        for symbol in ["PVH", "KVM_GUEST", "VIRTIO_PCI", "VIRTIO_PMEM", "VIRTIO_FS"] {
            assert_eq!(requests[symbol].request.value, Value::Text("y".to_owned()), "{symbol}");
        }
    }

    #[test]
    fn only_the_gpu_profile_has_modules() {
        let modules = |profile: Profile| profile.requests().unwrap()["MODULES"].request.value.to_string();
        assert_eq!((modules(Profile::Base), modules(Profile::Gpu)), ("n".to_owned(), "y".to_owned()));
    }

    #[test]
    fn a_symbol_in_two_fragments_is_refused_and_both_are_named() {
        let parse = |name| {
            let text = "about = \"x\"\n[symbols]\nPCI = { value = \"y\", reason = \"a test\" }\n";
            Fragment::parse(name, text).unwrap()
        };
        let error = merge(vec![parse("one"), parse("two")]).unwrap_err().to_string();
        assert!(error.contains("PCI") && error.contains("one") && error.contains("two"), "{error}");
    }
}
