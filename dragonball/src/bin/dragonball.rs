//! A virtual machine from the command line.

fn main() {}
