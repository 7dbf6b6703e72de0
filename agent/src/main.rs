//! PID 1 of the guest: sets the guest up and runs its containers.

fn main() {}
