//! All cases, by what they are about.

mod bad_guest;
mod bad_input;
mod crash;
mod cri;
pub mod devices;
mod disks;
mod docker;
mod exec;
mod exit;
mod guest_console;
mod leftover;
mod many;
mod network;
mod sizes;
mod soak;
mod stdio;
mod storage;
mod tasks;
mod terminal;

use crate::harness::Case;

/// Every case, in the order in which they run: the simple ones first.
#[must_use]
pub fn all() -> Vec<Case> {
    let of_containerd = [
        exit::CASES,
        stdio::CASES,
        terminal::CASES,
        exec::CASES,
        tasks::CASES,
        cri::lifecycle::CASES,
        cri::pod::CASES,
        cri::ports::CASES,
        cri::restart::CASES,
        cri::sandboxer::CASES,
        cri::streams::CASES,
        crash::CASES,
        many::CASES,
        devices::CASES,
        docker::CASES,
        soak::CASES,
    ];
    // containerd only passes on what these show.
    let of_runtime = [
        sizes::CASES,
        network::CASES,
        storage::CASES,
        disks::CASES,
        cri::security::CASES,
        cri::services::CASES,
        cri::volumes::CASES,
        leftover::CASES,
        guest_console::CASES,
        bad_input::CASES,
        bad_guest::CASES,
    ];
    let of_runtime = of_runtime.concat().into_iter().map(Case::whatever_containerd);
    of_containerd.concat().into_iter().chain(of_runtime).collect()
}

/// Options as `ctr` commands take them.
fn strings(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn no_name_is_part_of_another_so_that_cases_can_be_left_out_by_their_names() {
        let cases = super::all();
        for case in &cases {
            let alike = cases.iter().filter(|other| other.name.contains(case.name));
            assert_eq!(alike.count(), 1, "{}", case.name);
        }
    }

    #[test]
    fn every_case_has_its_own_name() {
        let cases = super::all();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), cases.len());
    }
}
