//! A TUN device: packets that the kernel sends are read from a descriptor, and packets written there are received by
//! the kernel.
//!
//! UNSAFETY: one system call reads a structure of plain bytes.
#![expect(unsafe_code, reason = "the safe crates do not know TUNSETIFF")]

use std::{
    ffi::{c_int, c_short},
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
};

use rustix::{
    fs::OFlags,
    ioctl::{Setter, ioctl, opcode},
};

/// Creates the device in the calling thread's network namespace. It exists until the descriptor is closed. Reads and
/// writes of the descriptor are of one packet each, and do not wait.
pub(super) fn create(name: &str) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun");
    let device = device.map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
    let mut request = Request { name: [0; NAME], flags: IFF_TUN | IFF_NO_PI, unused: [0; REST] };
    // One byte is left for the NUL.
    for (to, from) in request.name[..NAME - 1].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the number is that of the call that reads such a structure.
    let set = unsafe { Setter::<{ opcode::write::<c_int>(b'T', 202) }, Request>::new(request) };
    // SAFETY: the descriptor is of the driver whose call it is; `set` holds the structure until the call has ended.
    unsafe { ioctl(&device, set) }?;
    Ok(device)
}

/// The kernel's `struct ifreq` in this call.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    flags: c_short,
    unused: [u8; REST],
}

const NAME: usize = 16;
/// The kernel reads the whole structure: a union of four 64-bit words, minus the part used here.
const REST: usize = 24 - size_of::<c_short>();
/// Packets of IP.
const IFF_TUN: c_short = 1;
/// And nothing before them.
const IFF_NO_PI: c_short = 0x1000;
