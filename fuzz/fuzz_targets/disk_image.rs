//! Snapshots of machines in a qcow2 image. What a file does not have is not allocated, and a state may be longer than its file, because
//! clusters that are not there are zero: only its beginning is read.
#![no_main]

use std::io::Read;

use multifd_fuzz::shown;
use qemu_stream::stored::DiskImage;

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some(image) = shown(DiskImage::open(bytes)) else { return };
    for snapshot in image.snapshots() {
        let mut sum = 0;
        let mut state = image.state(snapshot);
        let mut piece = vec![0; 4096];
        while sum < MOST {
            match state.read(&mut piece) {
                Ok(0) => {
                    assert_eq!(sum, snapshot.state);
                    break;
                }
                Ok(count) => sum += count as u64,
                Err(error) => {
                    shown(Err::<(), _>(error));
                    break;
                }
            }
        }
        assert!(sum <= snapshot.state);
    }
});

/// Bytes of a state that are read.
const MOST: u64 = 1 << 20;
