//! Two hosts, one of which is lost: two network namespaces and a cable between them.
//!
//! ```text
//! near 10.9.0.1 ══ a pair of virtual interfaces ══ far 10.9.0.2, whose end is disconnected
//! ```

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::fd::AsFd,
    process::Command,
    thread::spawn,
    time::{Duration, Instant},
};

use multifd::channel::{Address, Connect, Listen, Listener, Stream};
use multifd_testkit::lacks;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::kit::context;

/// The namespaces, removed at the end.
struct Hosts {
    near: String,
    far: String,
}

impl Hosts {
    /// `None` without the permission to create them; the test is then skipped.
    fn new(test: &str) -> Option<Self> {
        let name = |end: &str| format!("multifd-{}-{test}-{end}", std::process::id());
        let hosts = Self { near: name("near"), far: name("far") };
        let (near, far) = (&hosts.near, &hosts.far);
        let steps = [
            format!("netns add {near}"),
            format!("netns add {far}"),
            format!("link add cable netns {near} type veth peer name cable netns {far}"),
            format!("-n {near} addr add 10.9.0.1/24 dev cable"),
            format!("-n {far} addr add 10.9.0.2/24 dev cable"),
            format!("-n {near} link set cable up"),
            format!("-n {far} link set cable up"),
        ];
        for step in steps {
            if let Err(reason) = ip(&step) {
                lacks(&format!("no two hosts: {reason}"));
                return None;
            }
        }
        Some(hosts)
    }

    fn pull(&self) {
        ip(&format!("-n {} link set cable down", self.far)).expect("the cable is there");
    }

    /// A connection from near to far that fails after 3 s without an answer.
    fn connection(&self) -> (Stream, Stream) {
        let listener = inside(&self.far, || Listener::bind(&address("tcp:10.9.0.2:0,user-timeout=3")));
        let mut listener = listener.expect("bound");
        let to = listener.local_address().clone();
        let near = inside(&self.near, move || to.connect(&context())).expect("connected");
        let far = listener.accept(&context()).expect("taken").expect("there");
        (Stream::new(near, &context()), Stream::new(far, &context()))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in [&self.near, &self.far] {
            // It may not have been created.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Runs `what` in a namespace: the sockets made there belong to it.
fn inside<T: Send + 'static>(name: &str, what: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(format!("/run/netns/{name}")).expect("the namespace");
    let thread = spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("let in");
        what()
    });
    thread.join().expect("no panic")
}

fn address(text: &str) -> Address {
    text.parse().expect(text)
}

/// The error of a wait, and its duration.
fn fails(wait: impl FnOnce() -> std::io::Result<()>) -> (std::io::Error, Duration) {
    let start = Instant::now();
    let error = wait().expect_err("the host is gone");
    (error, start.elapsed())
}

fn assert_noticed((error, time): (std::io::Error, Duration)) {
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(time >= Duration::from_secs(2) && time < Duration::from_secs(15), "{time:?}: {error}");
}

fn fill(stream: &mut Stream) -> std::io::Result<()> {
    loop {
        stream.write_all(&[0; 1 << 16])?;
    }
}

#[test]
#[ignore = "slow: waits for time-outs of the network"]
fn host_that_goes_while_data_are_under_way_is_noticed_by_the_sender() {
    let Some(hosts) = Hosts::new("send") else { return };
    let (mut near, _far) = hosts.connection();
    hosts.pull();
    let (error, time) = fails(|| fill(&mut near));
    assert!(error.to_string().starts_with("the host has not answered for "), "{error}");
    assert_noticed((error, time));
}

/// The last bytes have been passed to the system, and the test waits for the answer.
#[test]
#[ignore = "slow: waits for time-outs of the network"]
fn host_that_goes_with_the_last_bytes_is_noticed_by_whoever_waits_for_the_answer() {
    let Some(hosts) = Hosts::new("answer") else { return };
    let (mut near, _far) = hosts.connection();
    hosts.pull();
    near.write_all(b"the end").expect("the system takes it");
    assert_noticed(fails(|| near.read(&mut [0]).map(drop)));
}

#[test]
#[ignore = "slow: waits for time-outs of the network"]
fn host_that_goes_while_nothing_is_under_way_is_noticed_by_the_receiver() {
    let Some(hosts) = Hosts::new("receive") else { return };
    let (_near, mut far) = hosts.connection();
    hosts.pull();
    assert_noticed(fails(|| far.read(&mut [0]).map(drop)));
}

/// `TCP_USER_TIMEOUT` would fail this test: the window is closed, and every probe of it is answered.
#[test]
#[ignore = "slow: waits for time-outs of the network"]
fn host_that_answers_and_takes_nothing_in_is_waited_for_until_it_goes() {
    let Some(hosts) = Hosts::new("stopped") else { return };
    let (mut near, mut far) = hosts.connection();
    let start = Instant::now();
    let full = spawn(move || {
        let error = fill(&mut near).expect_err("the host is gone in the end");
        (error, start.elapsed())
    });
    std::thread::sleep(Duration::from_secs(12));
    assert!(!full.is_finished(), "four times the time set, and the peer is alive");
    // It reads a little, so the connection still carries bytes.
    far.read_exact(&mut [0; 1 << 20]).expect("received");
    std::thread::sleep(Duration::from_secs(1));
    hosts.pull();
    let (error, time) = full.join().expect("no panic");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(time < Duration::from_secs(60), "{time:?}: {error}");
}
