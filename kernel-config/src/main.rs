//! The guest kernel: typed configuration fragments and its build.

fn main() {}
