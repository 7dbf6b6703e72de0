//! What the project promises, measured and reported.
//!
//! Everything is measured in the lab machine, against a peer in the same run: [`site`] starts the machine, [`measure`]
//! runs in it and answers raw samples, [`figures`] makes figures of them and [`report`] writes those down.

pub mod chart;
pub mod cpio;
pub mod figures;
pub mod guest;
pub mod measure;
pub mod report;
pub mod sample;
pub mod site;
pub mod tools;
