//! The package of post-copy: sections of devices, with the description of their lengths before them.
//!
//! The input is a byte of options (1: no description) and the sections. With a description, two bytes of its length and the
//! description come before them. What was read is written again, and must be the same bytes.
#![no_main]

mod switch;

use multifd_fuzz::shown;
use qemu_stream::{
    incoming::{Event, Events},
    outgoing::EventWriter,
};
use switch::{before, device, package, stream::RAM};

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some((options, rest)) = bytes.split_first() else { return };
    let devices = match rest.split_first_chunk() {
        Some((&length, rest)) if options & 1 == 0 => {
            let (json, rest) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(length))));
            let length = u32::try_from(json.len()).expect("small").to_be_bytes();
            let description = device(u32::MAX, "multifd/description", &[&length[..], json].concat());
            [&description, rest].concat()
        }
        _ => rest.to_vec(),
    };
    let mut stream = before();
    stream.extend(package(&devices));
    // END with EOS and a footer, and the end of the stream.
    stream.extend([&[3][..], &RAM.0.to_be_bytes(), &0x10_u64.to_be_bytes()].concat());
    stream.extend([&[0x7e][..], &RAM.0.to_be_bytes(), &[0]].concat());
    let mut events = Events::new(&stream[..]);
    let (mut copy, mut found) = (EventWriter::new(Vec::new()), None);
    while let Some(event) = shown(events.next()) {
        copy.write(&event).expect("what was read is in order");
        if let Event::End(part) = event {
            found = Some(part);
            break;
        }
    }
    let Some(part) = found else { return };
    copy.flush().expect("into memory");
    assert_eq!(copy.into_inner(), stream, "what was read is written as it was");
    let mut length = 0;
    for section in part.sections() {
        length += part.body(section).expect("a section is in its part").len();
    }
    assert!(length <= part.as_bytes().len());
});
