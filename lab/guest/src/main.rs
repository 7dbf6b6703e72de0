//! Runs commands inside the lab machine for the lab driver.

fn main() {}
