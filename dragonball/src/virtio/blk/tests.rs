//! Tests of the block device through its ring, each with both engines.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use rstest::rstest;
use tempfile::NamedTempFile;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::{Harness, SECOND_REGION, Segment};

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Sectors of the test's disk.
const SECTORS: usize = 4096;

/// By what the requests are carried out.
#[derive(Clone, Copy, Debug)]
enum By {
    Ring,
    Thread,
}

impl By {
    fn engine(self) -> Engine {
        match self {
            // Where there is no io_uring this is the other one: the test then says the same twice.
            Self::Ring => Engine::new(128),
            Self::Thread => Engine::Immediate,
        }
    }
}

/// What is on the disk at first: every byte but zero.
static PATTERN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..SECTORS * 512).map(|at| (at / 512 + at).to_le_bytes()[0] | 1).collect());

fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&PATTERN).unwrap();
    file
}

struct Disk {
    harness: Harness<Blk>,
    image: NamedTempFile,
}

impl Disk {
    fn new(by: By) -> Self {
        let image = image();
        let device = Blk::with_engine(image.path(), false, by.engine()).unwrap();
        // Both engines and both kinds of rings, each with one of the other.
        let harness = match by {
            By::Ring => Harness::new(device),
            By::Thread => Harness::without_event_index(device),
        };
        Self { harness, image }
    }

    fn read_only(by: By) -> Self {
        let image = image();
        let harness = Harness::new(Blk::with_engine(image.path(), true, by.engine()).unwrap());
        Self { harness, image }
    }

    fn header(&mut self, kind: u32, sector: u64) -> Segment {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.harness.readable(&bytes)
    }

    /// The segments of a request, the last of which is the status.
    fn segments(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Vec<Segment> {
        let mut segments = vec![self.header(kind, sector)];
        segments.extend_from_slice(data);
        segments.push(self.harness.readable(&[0xee]));
        if let Some(Segment::Readable(address, length)) = segments.pop() {
            segments.push(Segment::Writable(address, length));
        }
        segments
    }

    /// Sends a request; returns its status.
    fn request(&mut self, kind: u32, sector: u64, data: &[Segment]) -> u8 {
        let segments = self.segments(kind, sector, data);
        self.harness.request(0, &segments);
        self.status(&segments)
    }

    fn status(&self, segments: &[Segment]) -> u8 {
        self.harness.bytes(*segments.last().unwrap())[0]
    }

    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let bytes = [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
        let data = self.harness.readable(&bytes);
        self.request(kind, 0, &[data])
    }

    fn on_host(&self, sector: usize, count: usize) -> Vec<u8> {
        let mut data = vec![0; count * 512];
        self.image.as_file().read_exact_at(&mut data, sector as u64 * 512).unwrap();
        data
    }
}

#[rstest]
fn sectors_are_read_and_written(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    let buffer = disk.harness.writable(1024);
    assert_eq!(disk.request(IN, 7, &[buffer]), 0);
    assert_eq!(disk.harness.bytes(buffer), PATTERN[7 * 512..9 * 512]);
    let data = disk.harness.readable(&[0x42; 1536]);
    assert_eq!(disk.request(OUT, 100, &[data]), 0);
    assert_eq!(disk.on_host(100, 3), [0x42; 1536]);
    assert_eq!(disk.on_host(99, 1), PATTERN[99 * 512..100 * 512]);
    assert_eq!(disk.request(FLUSH, 0, &[]), 0);
}

#[rstest]
fn data_in_odd_pieces_and_across_regions_is_put_together(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    let pieces = [
        disk.harness.writable(1),
        Segment::Writable(GuestAddress(SECOND_REGION - 1000), 2000),
        disk.harness.writable(47),
    ];
    assert_eq!(disk.request(IN, 3, &pieces), 0);
    let read = pieces.map(|piece| disk.harness.bytes(piece)).concat();
    assert_eq!(read, PATTERN[3 * 512..7 * 512]);
}

#[rstest]
fn many_requests_at_once_are_all_answered(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    let mut expected = HashMap::new();
    for round in 0..4_usize {
        for number in 0..42_u64 {
            let sector = round as u64 * 100 + number;
            let buffer = disk.harness.writable(512);
            let segments = disk.segments(IN, sector, &[buffer]);
            let head = disk.harness.rings[0].add(&segments);
            expected.insert(head, (sector, segments));
        }
        disk.harness.kick(0);
        while !expected.is_empty() {
            let used = disk.harness.wait_used(0);
            let (sector, segments) = expected.remove(&used.head).unwrap();
            assert_eq!((used.written, disk.status(&segments)), (513, 0));
            let at = usize::try_from(sector).unwrap() * 512;
            assert_eq!(disk.harness.bytes(segments[1]), PATTERN[at..at + 512]);
        }
    }
    disk.harness.settle();
}

#[rstest]
#[case::behind_the_end(SECTORS as u64, 512)]
#[case::across_the_end(SECTORS as u64 - 1, 1024)]
#[case::at_the_end_of_numbers(u64::MAX, 512)]
#[case::no_whole_sector(0, 511)]
#[case::no_offset(u64::MAX / 512 + 1, 512)]
fn what_is_not_on_the_disk_is_an_error(
    #[case] sector: u64,
    #[case] length: u32,
    #[values(By::Ring, By::Thread)] by: By,
) {
    let mut disk = Disk::new(by);
    let before = disk.on_host(0, SECTORS);
    let read = disk.harness.writable(length);
    assert_eq!(disk.request(IN, sector, &[read]), 1);
    let write = disk.harness.readable(&vec![9; length as usize]);
    assert_eq!(disk.request(OUT, sector, &[write]), 1);
    assert_eq!(disk.image.as_file().metadata().unwrap().len(), SECTORS as u64 * 512);
    assert!(disk.on_host(0, SECTORS) == before);
}

#[rstest]
fn a_read_only_disk_refuses_every_change(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::read_only(by);
    assert_ne!(disk.harness.device.features() & FEATURE_READ_ONLY, 0);
    assert_eq!(disk.harness.device.features() & (FEATURE_DISCARD | FEATURE_WRITE_ZEROES), 0);
    let data = disk.harness.readable(&[9; 512]);
    assert_eq!(disk.request(OUT, 0, &[data]), 1);
    assert_eq!(disk.range(DISCARD, 0, 1, 0), 1);
    assert_eq!(disk.range(WRITE_ZEROES, 0, 1, 0), 1);
    let buffer = disk.harness.writable(512);
    assert_eq!(disk.request(IN, 0, &[buffer]), 0);
    assert!(disk.on_host(0, SECTORS) == *PATTERN);
}

#[rstest]
fn zeroes_are_written_with_and_without_giving_space_up(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    let data = &*PATTERN;
    for (sector, flags) in [(16_usize, 0), (64, 1)] {
        assert_eq!(disk.range(WRITE_ZEROES, sector as u64, 8, flags), 0);
        assert_eq!(disk.on_host(sector, 8), [0; 4096]);
        assert_eq!(disk.on_host(sector - 1, 1), data[(sector - 1) * 512..sector * 512]);
        assert_eq!(disk.on_host(sector + 8, 1), data[(sector + 8) * 512..(sector + 9) * 512]);
    }
    assert_eq!(disk.range(WRITE_ZEROES, 0, 0, 0), 0);
}

#[rstest]
fn discarded_space_is_given_up(#[values(By::Ring, By::Thread)] by: By) {
    use std::os::unix::fs::MetadataExt;
    let mut disk = Disk::new(by);
    let before = disk.image.as_file().metadata().unwrap().blocks();
    match disk.range(DISCARD, 1024, 2048, 0) {
        0 => assert!(disk.image.as_file().metadata().unwrap().blocks() < before),
        // The file system of the temporary directory cannot.
        status => assert_eq!(status, 2),
    }
    assert_eq!(disk.range(DISCARD, 0, 0, 0), 0);
}

#[rstest]
#[case::behind_the_end(SECTORS as u64 - 1, 2, 0, 1)]
#[case::at_the_end_of_numbers(u64::MAX, 1, 0, 1)]
#[case::too_much(0, u32::MAX, 0, 1)]
#[case::an_unknown_flag(0, 1, 2, 2)]
fn bad_ranges_of_sectors_are_refused(
    #[case] sector: u64,
    #[case] count: u32,
    #[case] flags: u32,
    #[case] status: u8,
    #[values(DISCARD, WRITE_ZEROES)] kind: u32,
) {
    let mut disk = Disk::new(By::Ring);
    assert_eq!(disk.range(kind, sector, count, flags), status);
    assert!(disk.on_host(0, SECTORS) == *PATTERN);
}

#[rstest]
#[case(0)]
#[case(15)]
#[case(17)]
#[case(32)]
fn a_discard_without_exactly_one_range_is_refused(#[case] length: usize) {
    let mut disk = Disk::new(By::Ring);
    let data = disk.harness.readable(&vec![0; length]);
    assert_eq!(disk.request(DISCARD, 0, &[data]), 1);
}

#[test]
fn the_serial_number_fits_the_room_there_is_and_unknown_requests_are_not_supported() {
    let mut disk = Disk::new(By::Ring);
    let (whole, small) = (disk.harness.writable(20), disk.harness.writable(5));
    assert_eq!(disk.request(GET_ID, 0, &[whole]), 0);
    assert_eq!(disk.request(GET_ID, 0, &[small]), 0);
    let id = disk.harness.bytes(whole);
    assert_eq!(disk.harness.bytes(small), id[..5]);
    assert!(id.contains(&b'-'));
    for kind in [2, 3, 5, 7, 14, u32::MAX] {
        assert_eq!(disk.request(kind, 0, &[]), 2, "{kind}");
    }
}

#[test]
fn a_request_that_cannot_even_be_answered_is_a_protocol_error() {
    let short = |disk: &mut Disk| vec![disk.harness.readable(&[0; 15]), disk.harness.writable(1)];
    let deaf = |disk: &mut Disk| vec![disk.header(FLUSH, 0)];
    for segments in [short, deaf] {
        let mut disk = Disk::new(By::Ring);
        let segments = segments(&mut disk);
        disk.harness.submit(0, &segments);
        assert!(matches!(disk.harness.try_settle(9), Err(DeviceError::Protocol(_))));
    }
}

#[rstest]
fn a_file_that_became_shorter_fails_the_requests_behind_its_end(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    disk.image.as_file().set_len(100 * 512 + 100).unwrap();
    let inside = disk.harness.writable(512);
    assert_eq!(disk.request(IN, 99, &[inside]), 0);
    let (across, behind) = (disk.harness.writable(1024), disk.harness.writable(512));
    assert_eq!(disk.request(IN, 99, &[across]), 1);
    assert_eq!(disk.request(IN, 2000, &[behind]), 1);
}

#[test]
fn a_new_length_of_the_file_reaches_the_guest_when_it_is_told() {
    let mut disk = Disk::new(By::Ring);
    let capacity = |disk: &Disk| u64::from_le_bytes(disk.harness.device.config()[..8].try_into().unwrap());
    let resizer = disk.harness.device.resizer();
    resizer.resize().unwrap();
    disk.harness.settle();
    assert_eq!(disk.harness.config_changes, 0);
    for sectors in [5000, 300] {
        disk.image.as_file().set_len(sectors * 512).unwrap();
        assert_ne!(capacity(&disk), sectors);
        std::thread::scope(|scope| scope.spawn(|| resizer.resize().unwrap()).join().unwrap());
        disk.harness.settle();
        assert_eq!(capacity(&disk), sectors);
        let (last, behind) = (disk.harness.writable(512), disk.harness.writable(512));
        assert_eq!(disk.request(IN, sectors - 1, &[last]), 0);
        assert_eq!(disk.request(IN, sectors, &[behind]), 1);
    }
    assert_eq!(disk.harness.config_changes, 2);
}

#[rstest]
fn requests_in_flight_are_finished_before_a_save_and_new_ones_served_after_it(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    let mut flying = HashMap::new();
    for sector in 0..20 {
        let data = disk.harness.readable(&[u8::try_from(sector).unwrap() | 0x80; 512]);
        let segments = disk.segments(OUT, sector, &[data]);
        flying.insert(disk.harness.rings[0].add(&segments), segments);
    }
    disk.harness.kick(0);
    // One round starts them; the next would see the first completions.
    disk.harness.round(std::time::Instant::now()).unwrap();
    let buffer = disk.harness.writable(512);
    let later = disk.segments(IN, 3, &[buffer]);
    let head = disk.harness.rings[0].add(&later);
    flying.insert(head, later);

    let copy = image();
    let replacement = Blk::with_engine(copy.path(), false, by.engine()).unwrap();
    disk.harness.replace(replacement).unwrap();
    for sector in 0..20_usize {
        assert_eq!(disk.on_host(sector, 1), [u8::try_from(sector).unwrap() | 0x80; 512]);
    }
    while !flying.is_empty() {
        let used = disk.harness.wait_used(0);
        assert_eq!(disk.status(&flying.remove(&used.head).unwrap()), 0);
    }
    assert_eq!(disk.harness.bytes(buffer), PATTERN[3 * 512..4 * 512]);
}

#[test]
fn one_interrupt_tells_of_all_the_requests_of_one_ring_of_the_doorbell() {
    let mut disk = Disk::new(By::Thread);
    for sector in 0..20 {
        let buffer = disk.harness.writable(512);
        let segments = disk.segments(IN, sector, &[buffer]);
        disk.harness.rings[0].add(&segments);
    }
    disk.harness.kick(0);
    disk.harness.settle();
    assert_eq!((disk.harness.rings[0].used_index(), disk.harness.interrupt.queue(0)), (20, 1));
}

#[rstest]
fn a_reset_waits_for_the_host_and_the_device_works_again(#[values(By::Ring, By::Thread)] by: By) {
    let mut disk = Disk::new(by);
    let buffer = disk.harness.writable(1 << 20);
    let segments = disk.segments(IN, 0, &[buffer]);
    disk.harness.submit(0, &segments);
    disk.harness.round(std::time::Instant::now()).unwrap();
    disk.harness.reset();
    assert_eq!(disk.harness.events.watched(), 0);
    assert_eq!(disk.harness.device.pending.len(), 0);
    disk.harness.activate().unwrap();
    let buffer = disk.harness.writable(512);
    assert_eq!(disk.request(IN, 0, &[buffer]), 0);
}

#[test]
fn a_driver_that_makes_one_request_available_again_and_again_is_held_to_the_limit() {
    let mut disk = Disk::new(By::Ring);
    let buffer = disk.harness.writable(512);
    let segments = disk.segments(IN, 0, &[buffer]);
    let head = disk.harness.rings[0].add(&segments);
    for _ in 0..10 {
        for _ in 0..100 {
            disk.harness.rings[0].make_available(head);
        }
        disk.harness.kick(0);
        disk.harness.round(std::time::Instant::now()).unwrap();
        assert!(disk.harness.device.pending.len() <= 128);
        disk.harness.settle();
    }
    assert_eq!(disk.harness.rings[0].used_index(), 1001);
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let open = |path: &Path, read_only| Blk::open(path, read_only).map(|_| ());
    assert!(matches!(open(directory.path(), true), Err(BlkError::NotADisk(_))));
    assert!(matches!(open(&directory.path().join("none"), true), Err(BlkError::Open { .. })));
    assert!(matches!(open(Path::new("/dev/null"), true), Err(BlkError::NotADisk(_))));
    let small = NamedTempFile::new().unwrap();
    small.as_file().set_len(511).unwrap();
    assert!(matches!(open(small.path(), false), Err(BlkError::TooSmall { length: 511, .. })));
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let image = image();
    let reader = Blk::open(image.path(), true).unwrap();
    assert!(matches!(Blk::open(image.path(), false), Err(BlkError::InUse(_))));
    let second = Blk::open(image.path(), true).unwrap();
    drop((reader, second));
    let writer = Blk::open(image.path(), false).unwrap();
    for read_only in [false, true] {
        assert!(matches!(Blk::open(image.path(), read_only), Err(BlkError::InUse(_))));
    }
    drop(writer);
    Blk::open(image.path(), false).unwrap();
}
