//! Two hosts, and a line between them that loses, delays and reorders packets, is slow, or is disconnected.
//!
//! ```text
//!   near 10.77.0.1                                      far 10.77.0.2
//!   namespace, kernel's TCP                             namespace, kernel's TCP
//!   device "rough" ──▶ descriptor ══ relay (threads) ══ descriptor ◀── device "rough"
//! ```
//!
//! A host is a separate network namespace with one device, a TUN, so the kernel implements everything above the wire.
//! The wire is [`relay`]: it reads whole IP packets at one end and writes or drops them at the other. A seed determines
//! what it does to a packet. What the two kernels send depends on time, so runs are similar but not identical.
//!
//! Nothing is left behind: a namespace exists as long as its descriptor here and the processes in it, a device as long
//! as its own descriptor. Descriptors are closed in the drop, and by the system when this process ends.
//!
//! UNSAFETY: one system call gives the calling thread a namespace.
#![expect(unsafe_code, reason = "a thread gets a namespace of its own")]

mod relay;
mod tun;

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::lacks;
use relay::Relay;
pub use relay::{Carried, Line};

/// Two hosts and the line between them.
#[derive(Debug)]
pub struct Network {
    /// Dropped first, because it owns the devices.
    relay: Relay,
    near: Host,
    far: Host,
}

impl Network {
    /// Creates the line. `None` if this machine does not support it; the running test is then listed as skipped.
    pub fn new(line: &Line) -> Option<Self> {
        let hosts = Host::new(NEAR).and_then(|near| Ok((near, Host::new(FAR)?)));
        let laid = hosts.and_then(|((near, one), (far, other))| {
            Ok(Self { relay: Relay::start(line, Arc::new(one), Arc::new(other))?, near, far })
        });
        laid.map_err(|error| lacks(&format!("no two hosts with a line between them: {error}"))).ok()
    }

    /// One host.
    pub fn near(&self) -> &Host {
        &self.near
    }

    /// The other host.
    pub fn far(&self) -> &Host {
        &self.far
    }

    /// Disconnects the line: packets on it and all later packets are lost. Neither host is notified.
    pub fn pull(&self) {
        self.relay.plug(false);
    }

    /// Connects it again.
    pub fn plug(&self) {
        self.relay.plug(true);
    }

    /// The numbers of packets so far, near to far and far to near.
    pub fn carried(&self) -> [Carried; 2] {
        self.relay.carried()
    }

    /// Waits until the line has carried `bytes` bytes from near to far. Returns whether it did so in time.
    #[must_use]
    pub fn wait_carried(&self, bytes: u64, patience: Duration) -> bool {
        self.relay.wait_carried(bytes, patience)
    }
}

/// A host: a network namespace.
#[derive(Debug)]
pub struct Host {
    namespace: File,
    address: Ipv4Addr,
}

impl Host {
    /// A host, and the descriptor of its device.
    fn new(address: Ipv4Addr) -> io::Result<(Self, File)> {
        let (namespace, device) = namespace(move || {
            let device = tun::create(DEVICE)?;
            // There is only one line, and only IPv4 is used.
            run("ip", &format!("addr add {address}/24 dev {DEVICE}"))?;
            run("ip", &format!("link set {DEVICE} mtu {MTU} up"))?;
            run("ip", "link set lo up")?;
            Ok(device)
        })?;
        Ok((Self { namespace, address }, device))
    }

    /// A single host, whose loopback device is a line: the kernel (`tbf`) limits it to `rate`, as `tc` reads it, both directions
    /// together. `None` if this machine does not support it; the running test is then listed as skipped.
    pub fn shaped(rate: &str) -> Option<Self> {
        let limit = format!("qdisc add dev lo root tbf rate {rate} burst {BURST} limit {QUEUE}");
        let shaped = namespace(move || {
            run("ip", &format!("link set lo mtu {SHAPED_MTU} up"))?;
            run("tc", &limit)
        });
        let host = shaped.map(|(namespace, ())| Self { namespace, address: Ipv4Addr::LOCALHOST });
        host.map_err(|error| lacks(&format!("no line with a limit: {error}"))).ok()
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The words before a command that make it run on this host. They are valid as long as this value exists.
    pub fn launcher(&self) -> [String; 3] {
        let (process, descriptor) = (std::process::id(), self.namespace.as_raw_fd());
        ["nsenter".into(), format!("--net=/proc/{process}/fd/{descriptor}"), "--".into()]
    }

    /// Runs `what` on this host, in a separate thread: its sockets, and those of threads that it starts, belong to the
    /// host.
    ///
    /// # Panics
    /// If it panics, or the thread cannot enter the namespace.
    pub fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        thread::scope(|threads| {
            let thread = threads.spawn(|| {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(self.namespace.as_fd(), network)
                    .expect("whoever made it is let in");
                what()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Creates a network namespace, with what `set_up` makes in it.
fn namespace<T: Send + 'static>(
    set_up: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<(File, T)> {
    // The thread has the namespace until it ends, then only the descriptor has.
    let made = thread::spawn(move || {
        // SAFETY: descriptors stay shared with the other threads; only the network is the thread's own.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok((namespace, set_up()?))
    });
    made.join().map_err(|_| io::Error::other("a panic"))?
}

/// Runs a program of iproute2.
fn run(program: &str, arguments: &str) -> io::Result<()> {
    let output = Command::new(program).args(arguments.split(' ')).output();
    let output = output.map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} {arguments}: {}", told.trim())))
}

const NEAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const DEVICE: &str = "rough";
/// The MTU of an Ethernet.
const MTU: usize = 1500;
/// Packets of the loopback device that fit into a burst.
const SHAPED_MTU: usize = 9000;
const BURST: &str = "128k";
/// Bytes that wait for the line: a router's queue of some milliseconds.
const QUEUE: &str = "512k";
