//! The block device, on a disk of a megabyte that becomes shorter and longer.
#![no_main]

use dragonball::virtio::blk::Blk;
use dragonball::virtio::testing::Harness;
use dragonball::virtio::testing::script::{Script, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut script = Script::new(bytes);
    let image = tempfile::NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(1 << 20).expect("a megabyte");
    let blk = Blk::open(image.path(), script.byte() & 1 == 1).expect("a disk");
    let resizer = blk.resizer();
    run(&mut Harness::new(blk), script, |_, script| {
        let length = u64::from(script.half()) * 16;
        image.as_file().set_len(length).expect("at most a megabyte");
        if script.byte() & 1 == 0 {
            resizer.resize().expect("an event");
        }
    });
});
