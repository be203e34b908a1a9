//! The stream of a source that switches to post-copy.

#[path = "../../../crates/qemu-stream/tests/early/switch.rs"]
pub(crate) mod stream;

use qemu_stream::format::{Command, MachineType};

use stream::{begin, command, discard};
pub(crate) use stream::{device, package};

/// Everything before the package: two blocks, of which some pages are discarded.
pub(crate) fn before() -> Vec<u8> {
    let machine = MachineType::new("pc-q35-10.0").expect("a name");
    let ranges = [(0, 0x3000), (0x10000, 0x1000)];
    [begin(machine, &[("a", 100), ("b", 3)]), discard("a", &ranges), command(Command::Ping(2))].concat()
}
