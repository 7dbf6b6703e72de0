//! The kinds of lab machine there are, each kept as a snapshot of one that has just come up.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A kind of machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Snapshot {
    /// Two CPUs, containerd 1.7 up.
    Base,
    /// Two CPUs, containerd 2.1 up.
    Containerd21,
    /// One CPU whose every instruction takes one nanosecond of virtual time, containerd 1.7 up: for measurements
    /// that repeat whatever else the host does.
    Icount,
}

const STANDARD_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Keeps loops calibrated, time sources trusted and mitigations off: they cost a minute when CPUs are emulated.
const KERNEL_OPTIONS: &str = "console=ttyS0 panic=1 loglevel=4 mitigations=off nokaslr audit=0 random.trust_cpu=on \
    tsc=reliable no_timer_check lpj=4000000 rcupdate.rcu_expedited=1";

impl Snapshot {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Base, Self::Containerd21, Self::Icount];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Containerd21 => "containerd-2.1",
            Self::Icount => "icount",
        }
    }

    /// Number of CPUs.
    #[must_use]
    pub fn cpus(self) -> u32 {
        match self {
            Self::Base | Self::Containerd21 => 2,
            Self::Icount => 1,
        }
    }

    /// Memory in MiB.
    #[must_use]
    pub fn memory(self) -> u32 {
        4096
    }

    /// Whether its clock counts instructions; its time of day is its own then.
    #[must_use]
    pub fn counts_instructions(self) -> bool {
        self == Self::Icount
    }

    /// The kernel's command line.
    pub(crate) fn kernel_options(self) -> String {
        let path = match self {
            Self::Base | Self::Icount => STANDARD_PATH.to_owned(),
            Self::Containerd21 => format!("/opt/containerd-2.1/bin:/opt/runc-1.3/bin:{STANDARD_PATH}"),
        };
        let more = if self.counts_instructions() {
            // Without it, addresses differ between runs, and so do the numbers of instructions.
            "norandmaps"
        } else {
            // For the command server (`lab/guest/src/mend.rs`): it would be seen in measurements.
            "lab.mend"
        };
        format!("{KERNEL_OPTIONS} {more} lab.path={path}")
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Snapshot {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|snapshot| snapshot.name() == name)
            .ok_or_else(|| Error::NoSnapshot { name: name.to_owned(), known: Self::ALL.map(Self::name).join(", ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_known_by_its_name_and_no_other() {
        for snapshot in Snapshot::ALL {
            assert_eq!(snapshot.name().parse::<Snapshot>().unwrap(), snapshot);
        }
        let error = "bass".parse::<Snapshot>().unwrap_err().to_string();
        assert_eq!(error, "There is no snapshot \"bass\"; there are: base, containerd-2.1, icount");
    }

    #[test]
    fn each_snapshot_finds_its_own_containerd_first() {
        assert!(Snapshot::Base.kernel_options().contains(" lab.path=/usr/local/sbin:"));
        assert!(Snapshot::Containerd21.kernel_options().contains(" lab.path=/opt/containerd-2.1/bin:"));
        assert!(Snapshot::Icount.kernel_options().contains(" norandmaps "));
    }
}
