//! Real addresses: sockets of each family, virtual sockets, commands.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{sleep, spawn},
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, ReceiveOptions, Receiver, SendOptions, Sender,
    channel::{Address, Connect, Context, Link, Listen, Listener, Stop, Stream},
    error::{Error, Usage},
    ram::PageSize,
    wire::{ChannelId, Initial, VmUuid},
};
use multifd_testkit::lacks;

use crate::kit::{TIMEOUT, context, fresh};

fn address(text: &str) -> Address {
    text.parse().expect(text)
}

fn connect(text: &str) -> std::io::Result<Stream> {
    address(text).connect(&context()).map(|link| Stream::new(link, &context()))
}

fn start(command: &str) -> Stream {
    connect(&format!("exec:{command}")).expect(command)
}

/// The port of a listener, and whether each family reaches it.
fn reached(options: &str) -> (bool, bool) {
    let listener = Listener::bind(&address(&format!("tcp::0{options}"))).expect(options);
    let Address::Tcp { port, .. } = *listener.local_address() else { panic!("no tcp") };
    let reaches = |host: &str| TcpStream::connect((host, port)).is_ok();
    (reaches("127.0.0.1"), reaches("::1"))
}

fn has_ipv6() -> bool {
    let has = TcpListener::bind("[::1]:0").is_ok();
    if !has {
        lacks("this machine has no IPv6");
    }
    has
}

#[test]
fn listener_at_every_address_takes_the_families_asked_for() {
    if !has_ipv6() {
        return;
    }
    for (options, expected) in [
        ("", (true, true)),
        (",ipv4=on,ipv6=on", (true, true)),
        (",ipv4", (true, false)),
        (",ipv6=off", (true, false)),
        (",ipv6=on", (false, true)),
        (",ipv4=off", (false, true)),
    ] {
        assert_eq!(reached(options), expected, "{options}");
    }
}

#[test]
fn connect_takes_the_family_asked_for() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    let link = connect(&format!("tcp:localhost:{port},ipv4=on")).expect("connected");
    assert_eq!(link.peer(), format!("127.0.0.1:{port}"));
    let refused = connect(&format!("tcp:127.0.0.1:{port},ipv6=on")).expect_err("another family");
    assert_eq!(refused.to_string(), "the host has no IPv6 address");
}

#[test]
fn command_takes_what_is_sent_and_gives_what_it_says() {
    let mut stream = start("tr a-z A-Z");
    assert_eq!(stream.peer(), "exec:tr a-z A-Z");
    stream.write_all(b"there and back").expect("sent");
    stream.close_write().expect("closed");
    let mut back = String::new();
    stream.read_to_string(&mut back).expect("received");
    assert_eq!(back, "THERE AND BACK");
    stream.finish().expect("exit status 0");
}

#[test]
fn command_is_run_by_a_shell() {
    let mut stream = start("for word in a 'b c'; do printf '%s.' \"$word\"; done");
    let mut back = String::new();
    stream.read_to_string(&mut back).expect("received");
    assert_eq!(back, "a.b c.");
}

#[test]
fn command_has_written_all_away_when_it_is_taken_leave_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    let mut stream = start(&format!("sleep 0.2; cat >'{}'", file.display()));
    stream.write_all(&[7; 100_000]).expect("sent");
    stream.finish().expect("exit status 0");
    assert_eq!(fs::read(&file).expect("written"), [7; 100_000]);
}

#[test]
fn exit_status_other_than_0_is_an_error_that_names_it() {
    let told = "the command ended with exit status 3";
    let error = start("cat >/dev/null; exit 3").finish().expect_err("failed");
    assert_eq!(error.to_string(), told);
    let error = start("exit 3").read(&mut [0; 8]).expect_err("failed");
    assert_eq!(error.to_string(), told);
    let mut stream = start("exit 3");
    let error = loop {
        if let Err(error) = stream.write(&[0; 65536]) {
            break error;
        }
    };
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::BrokenPipe, told));
    let error = start("kill -9 $$").finish().expect_err("killed");
    assert_eq!(error.to_string(), "the command ended by signal 9");
    let error = start("/no/such/program 2>/dev/null").finish().expect_err("none");
    assert_eq!(error.to_string(), "the command ended with exit status 127");
}

#[test]
fn output_that_ends_well_is_no_error() {
    let mut stream = start("true");
    assert_eq!(stream.read(&mut [0; 8]).expect("the end"), 0);
    stream.finish().expect("exit status 0");
}

/// A command that prints its process number, then does what the test needs.
fn numbered(then: &str) -> (Stream, String) {
    let mut stream = start(&format!("echo $$; {then}"));
    let mut number = String::new();
    while !number.ends_with('\n') {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).expect("its number"), 1);
        number.push(char::from(byte[0]));
    }
    (stream, format!("/proc/{}", number.trim()))
}

#[test]
fn command_ends_with_its_connection_however_little_it_likes_to() {
    for then in ["cat >/dev/null", "exec sleep 600", "trap '' TERM; while :; do sleep 5; done"] {
        let (stream, process) = numbered(then);
        assert!(fs::exists(&process).expect("asked"), "{then}");
        let start = Instant::now();
        drop(stream);
        assert!(!fs::exists(&process).expect("asked"), "{then} is reaped");
        assert!(start.elapsed() < TIMEOUT, "{then}");
    }
}

#[test]
fn stop_ends_a_command_and_whoever_waits_for_it() {
    for wait in [
        (|stream| stream.read(&mut [0]).map(|length| assert_eq!(length, 0))) as fn(&mut Stream) -> _,
        |stream| stream.finish(),
        |stream| loop {
            stream.write_all(&[0; 65536])?;
        },
    ] {
        let (mut stream, process) = numbered("exec sleep 600");
        let stop = Stop::new();
        let watch = stop.watch_failure(stream.waker());
        let canceller = spawn(move || {
            sleep(Duration::from_millis(50));
            stop.cancel();
        });
        let start = Instant::now();
        // Whether it is an error or the end of the stream depends on which happens first.
        let _ = wait(&mut stream);
        drop((stream, watch));
        assert!(start.elapsed() < TIMEOUT && !fs::exists(&process).expect("asked"));
        canceller.join().expect("no panic");
    }
}

#[test]
fn one_connection_carries_no_channels() {
    let told = |error: Error| match error.kind() {
        Error::Usage(Usage::SingleConnection(address)) => address.clone(),
        other => panic!("{other:?}"),
    };
    let mut sender =
        Sender::new(SendOptions::new(), fresh(PageSize::KIB_4, &[("pc.ram", 4096)]), Stop::new())
            .expect("made");
    let command = Arc::new(address("exec:cat"));
    assert_eq!(told(sender.set_up(command).expect_err("refused")), "exec:cat");
    let options = ReceiveOptions::new().channels(ChannelCount::Exact(1));
    let mut receiver = Receiver::new(options, Stop::new());
    let listener = Listener::bind(&address("exec:true")).expect("started");
    assert_eq!(told(receiver.listen(Box::new(listener)).expect_err("refused")), "exec:true");
}

#[test]
fn command_is_the_one_connection_of_a_listener() {
    let mut listener = Listener::bind(&address("exec:echo here")).expect("started");
    assert!(listener.is_single());
    let mut first = Stream::new(listener.accept(&context()).expect("taken").expect("there"), &context());
    let mut said = String::new();
    first.read_to_string(&mut said).expect("received");
    assert_eq!(said, "here\n");
    assert!(listener.accept_waiting(&context()).expect("asked").is_none());
    let waker = listener.waker();
    let woken = spawn(move || waker.wake());
    assert!(listener.accept(&context()).expect("asked").is_none());
    woken.join().expect("no panic");
}

/// A foreign connection is dropped and the next one waited for, unless there can be no next one.
#[test]
fn only_connection_that_is_no_main_ends_the_migration() {
    let folder = tempfile::tempdir().expect("a folder");
    let channel = folder.path().join("channel");
    let initial = Initial { uuid: VmUuid([7; 16]), id: ChannelId(0) };
    fs::write(&channel, initial.encode()).expect("written");
    for (command, expected) in [
        ("exit 3".to_owned(), "the command ended with exit status 3"),
        ("true".to_owned(), "the initial packet"),
        ("yes 2>/dev/null".to_owned(), "expected"),
        (format!("cat {}", channel.display()), "is a single connection and cannot carry channels"),
    ] {
        let mut receiver = Receiver::new(ReceiveOptions::new(), Stop::new());
        let listener = Listener::bind(&address(&format!("exec:{command}"))).expect("started");
        receiver.listen(Box::new(listener)).expect("listens");
        let error = receiver.wait_main().map(drop).expect_err("no main");
        let told = format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
        assert!(told.contains(expected) && told.contains(&format!("exec:{command}")), "{command}: {told}");
    }
}

/// A command may need a long time before it sends anything.
#[test]
fn only_connection_is_given_more_time_than_a_stranger() {
    let options = ReceiveOptions::new().greeting_timeout(Duration::from_millis(50));
    let mut receiver = Receiver::new(options, Stop::new());
    let listener = Listener::bind(&address("exec:sleep 1; printf QEVM")).expect("started");
    receiver.listen(Box::new(listener)).expect("listens");
    let mut main = receiver.wait_main().expect("main");
    let mut magic = [0; 4];
    main.read_exact(&mut magic).expect("received");
    assert_eq!(&magic, b"QEVM");
}

/// Connects until the listener's queue is full.
fn fill(path: &std::path::Path) -> Vec<Box<dyn Link>> {
    let to = address(&format!("unix:{}", path.display()));
    std::iter::from_fn(|| {
        to.connect(&Context::new(&Stop::new()).connect_timeout(Duration::from_millis(30))).ok()
    })
    .collect()
}

#[test]
fn connect_to_a_full_unix_queue_goes_on_when_there_is_room_and_ends_with_the_stop() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("made");
    socket.bind(&socket2::SockAddr::unix(&path).expect("a path")).expect("bound");
    socket.listen(1).expect("listening");
    let queued = fill(&path);
    assert!(!queued.is_empty());
    let (to, stop) = (address(&format!("unix:{}", path.display())), Stop::new());
    let waiting = |stop: Stop| {
        let to = to.clone();
        spawn(move || to.connect(&Context::new(&stop).connect_timeout(TIMEOUT)).map(drop))
    };
    let (stopped, served) = (waiting(stop.clone()), waiting(Stop::new()));
    sleep(Duration::from_millis(30));
    stop.cancel();
    stopped.join().expect("no panic").expect_err("stopped");
    drop(socket.accept().expect("one taken off the queue"));
    served.join().expect("no panic").expect("connected");
}

fn vsock() -> bool {
    let made = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None);
    if let Err(error) = &made {
        lacks(&format!("no virtual sockets: {error}"));
    }
    made.is_ok()
}

#[test]
fn listener_at_a_virtual_socket_says_its_port() {
    if !vsock() {
        return;
    }
    let mut listener = Listener::bind(&address("vsock::4294967295")).expect("bound");
    let Address::Vsock { cid: Address::CID_ANY, port } = *listener.local_address() else {
        panic!("{:?}", listener.local_address())
    };
    assert_ne!(port, u32::MAX);
    assert_eq!(listener.address(), format!("vsock:4294967295:{port}"));
    assert!(!listener.is_single() && listener.accept_waiting(&context()).expect("asked").is_none());
    let taken = Listener::bind(&address(&format!("vsock::{port}"))).map(drop).expect_err("taken");
    assert_eq!(taken.kind(), ErrorKind::AddrInUse);
}

/// There is no such machine; the system reports that, or there is no reply.
#[test]
fn connect_to_an_absent_context_id_fails_in_its_time() {
    if !vsock() {
        return;
    }
    let start = Instant::now();
    let error = address("vsock:3000000000:5000")
        .connect(&Context::new(&Stop::new()).connect_timeout(Duration::from_millis(500)));
    let error = error.map(drop).expect_err("absent");
    assert!(start.elapsed() < Duration::from_secs(2), "{error}");
    let stop = Stop::new();
    let connecting = spawn({
        let stop = stop.clone();
        move || {
            address("vsock:3000000000:5000").connect(&Context::new(&stop).connect_timeout(TIMEOUT)).map(drop)
        }
    });
    stop.cancel();
    connecting.join().expect("no panic").expect_err("stopped");
}

/// If the system supports virtual sockets to itself, a byte goes over many.
#[test]
fn virtual_sockets_carry_many_connections() {
    if !vsock() {
        return;
    }
    let mut listener = Listener::bind(&address("vsock::4294967295")).expect("bound");
    let Address::Vsock { port, .. } = *listener.local_address() else { panic!("no vsock") };
    let local = address(&format!("vsock:1:{port}"));
    let mut links = match local.connect(&context()) {
        Ok(link) => vec![Stream::new(link, &context())],
        Err(error) => return lacks(&format!("virtual sockets do not reach this machine itself: {error}")),
    };
    links.extend((0..3).map(|_| Stream::new(local.connect(&context()).expect("connected"), &context())));
    for link in &mut links {
        let mut taken = Stream::new(listener.accept(&context()).expect("taken").expect("there"), &context());
        assert!(taken.peer().starts_with("vsock:1:"), "{}", taken.peer());
        taken.write_all(b"x").expect("sent");
        assert_eq!(link.read(&mut [0; 8]).expect("received"), 1);
    }
}

/// Regression, found by the soak test: a destination that continued to read to the end after its stop had shut main
/// down closed without a reset, and announced no room. The source's system asked for room until the other system had
/// forgotten the connection a minute later. Only then was the source informed that its guest stays.
#[test]
fn a_source_whose_bytes_fill_the_network_hears_at_once_that_its_destination_has_stopped() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("listening");
    let address = listener.local_address().clone();
    let stop = Stop::new();
    let mut receiver = Receiver::new(ReceiveOptions::new(), stop.clone());
    receiver.listen(Box::new(listener)).expect("listening");
    let sent = Arc::new(AtomicU64::new(0));
    let source = spawn({
        let sent = sent.clone();
        move || {
            let mut main = Stream::new(address.connect(&context()).expect("connected"), &context());
            main.write_all(b"QEVM").expect("written");
            let error = loop {
                match main.write(&[0; 1 << 14]) {
                    Ok(bytes) => sent.fetch_add(bytes as u64, Ordering::SeqCst),
                    Err(error) => break error,
                };
            };
            (error.kind(), Instant::now())
        }
    });
    let mut main = receiver.wait_main().expect("main");
    // Until the network accepts no more.
    let mut before = u64::MAX;
    while std::mem::replace(&mut before, sent.load(Ordering::SeqCst)) != sent.load(Ordering::SeqCst) {
        sleep(Duration::from_millis(300));
    }
    stop.cancel();
    let stopped = Instant::now();
    let _ = main.read_to_end(&mut Vec::new());
    drop(main);
    drop(receiver);
    let (kind, heard) = source.join().expect("no panic");
    assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{kind:?}");
    // Half of the system's minute, with a margin for a busy machine.
    assert!(heard.saturating_duration_since(stopped) < Duration::from_secs(30));
}
