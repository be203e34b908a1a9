//! A TLS session whose two directions belong to two threads, against a peer that uses rustls directly: everything arrives,
//! keys change meanwhile, and each direction ends by itself.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use multifd::channel::{
    Address, Connect, Context, Listen, Listener, Stop, Stream, Wake,
    tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
};
use multifd_testkit::certificates::write_both;
use rustls::{
    ServerConfig, ServerConnection, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::{TLS12, TLS13},
};

use crate::kit::{TIMEOUT, spawn};

/// Bytes of each direction.
const LENGTH: usize = 24 << 20;

/// The byte at this place of a direction.
fn pattern(seed: u8, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| u8::try_from((at + usize::from(seed)) % 251).expect("small")).collect()
}

fn config(folder: &Path, version: &'static SupportedProtocolVersion) -> ServerConfig {
    let read = |name: &str| std::fs::read(folder.join(name)).expect("read");
    let chain = CertificateDer::pem_slice_iter(&read("server-cert.pem")).collect::<Result<_, _>>();
    let key = PrivateKeyDer::from_pem_slice(&read("server-key.pem")).expect("a key");
    ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[version])
        .expect("a version")
        .with_no_client_auth()
        .with_single_cert(chain.expect("a chain"), key)
        .expect("a certificate")
}

/// The other end, for two threads.
#[derive(Clone)]
struct Peer {
    socket: Arc<TcpStream>,
    session: Arc<Mutex<ServerConnection>>,
    /// Bytes of the connection that have arrived.
    raw: Arc<Mutex<Vec<u8>>>,
}

impl Peer {
    /// Accepts a connection and does the handshake.
    fn accept(listener: &TcpListener, config: ServerConfig) -> Self {
        let (mut socket, _) = listener.accept().expect("accepted");
        let mut session = ServerConnection::new(Arc::new(config)).expect("a session");
        session.set_buffer_limit(None);
        while session.is_handshaking() {
            session.complete_io(&mut socket).expect("a handshake");
        }
        while session.wants_write() {
            session.write_tls(&mut socket).expect("sent");
        }
        Self { socket: Arc::new(socket), session: Arc::new(Mutex::new(session)), raw: Arc::default() }
    }

    /// Sends bytes; `rekeys` changes the keys first.
    fn send(&self, bytes: &[u8], rekeys: bool) -> io::Result<()> {
        let mut sealed = Vec::new();
        let mut session = self.session.lock().expect("whole");
        if rekeys {
            session.refresh_traffic_keys().expect("TLS 1.3");
        }
        session.writer().write_all(bytes)?;
        while session.wants_write() {
            session.write_tls(&mut sealed)?;
        }
        drop(session);
        (&*self.socket).write_all(&sealed)
    }

    fn close(&self) {
        let mut sealed = Vec::new();
        let mut session = self.session.lock().expect("whole");
        session.send_close_notify();
        while session.wants_write() {
            session.write_tls(&mut sealed).expect("sealed");
        }
        drop(session);
        (&*self.socket).write_all(&sealed).expect("sent");
        self.socket.shutdown(Shutdown::Write).expect("closed");
    }

    /// Receives some bytes; none after the closing alert.
    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = (&*self.socket).read(&mut buffer)?;
            self.raw.lock().expect("whole").extend(&buffer[..read]);
            let (mut arrived, mut plain) = (&buffer[..read], Vec::new());
            let mut session = self.session.lock().expect("whole");
            loop {
                session.read_tls(&mut arrived)?;
                session.process_new_packets().map_err(io::Error::other)?;
                match session.reader().read_to_end(&mut plain) {
                    Ok(_) => return Ok(plain),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                if arrived.is_empty() {
                    break;
                }
            }
            if !plain.is_empty() {
                return Ok(plain);
            }
        }
    }

    /// Receives everything up to the closing alert, which must be this much of the pattern.
    fn expect(&self, seed: u8, length: usize) {
        let mut at = 0;
        loop {
            let bytes = self.receive().expect("received");
            if bytes.is_empty() {
                break;
            }
            assert!(bytes == pattern(seed, at, bytes.len()), "what was sent arrives, at {at}");
            at += bytes.len();
        }
        assert_eq!(at, length);
    }
}

/// A source that has connected, and its peer.
fn connected(version: &'static SupportedProtocolVersion, rekey_after: Option<u64>) -> (Stream, Stream, Peer) {
    let folder = tempfile::tempdir().expect("a folder");
    write_both(folder.path()).expect("certificates");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = format!("tcp:{}", listener.local_addr().expect("an address")).parse::<Address>();
    let config = config(folder.path(), version);
    let peer = spawn("destination", move || Peer::accept(&listener, config));
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials");
    let client = match rekey_after {
        Some(records) => client.rekey_after(records),
        None => client,
    };
    let connector = TlsConnector::new(Arc::new(address.expect("an address")), client);
    let context = Context::new(&Stop::new()).stall_timeout(None);
    let stream = Stream::new(connector.connect(&context).expect("connected"), &context);
    let (receives, sends) = stream.split().expect("it can be split");
    (receives, sends, peer.join().expect("no panic"))
}

/// Sends this much of the pattern, in pieces of many sizes.
fn sends(mut stream: Stream, seed: u8, length: usize) -> JoinHandle<Stream> {
    spawn("sender", move || {
        let (mut at, mut size) = (0, 1);
        while at < length {
            let piece = size.min(length - at);
            stream.write_all(&pattern(seed, at, piece)).expect("sent");
            (at, size) = (at + piece, size * 7 % 300_007);
        }
        stream
    })
}

/// Receives up to the end, which must be this much of the pattern.
fn receives(mut stream: Stream, seed: u8, length: usize) -> JoinHandle<Stream> {
    spawn("receiver", move || {
        let (mut at, mut buffer) = (0, vec![0; 100_000]);
        loop {
            let read = stream.read(&mut buffer).expect("received");
            if read == 0 {
                break;
            }
            assert!(buffer[..read] == pattern(seed, at, read), "what was sent arrives, at {at}");
            at += read;
        }
        assert_eq!(at, length);
        stream
    })
}

/// The number of records that are as long as a change of keys.
fn key_changes(raw: &[u8]) -> usize {
    let (mut rest, mut count) = (raw, 0);
    while let [kind, _, _, high, low, behind @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        count += usize::from(*kind == 0x17 && length == 5 + 1 + 16);
        rest = behind.get(length..).unwrap_or_default();
    }
    count
}

/// Whether a thread ends in time, and its result.
fn ends<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    let (done, waits) = mpsc::channel();
    spawn("join", move || done.send(thread.join()));
    waits.recv_timeout(TIMEOUT).expect("it ends in time").expect("no panic")
}

#[test]
fn both_directions_carry_everything_at_once() {
    for (version, rekeys) in [(&TLS13, true), (&TLS13, false), (&TLS12, false)] {
        let (near, far, peer) = connected(version, rekeys.then_some(20));
        let sender = sends(far, 7, LENGTH);
        let receiver = receives(near, 9, LENGTH);
        let other_sender = spawn("other sender", {
            let peer = peer.clone();
            move || {
                let mut at = 0;
                while at < LENGTH {
                    let piece = (200_000).min(LENGTH - at);
                    peer.send(&pattern(9, at, piece), rekeys && at % 5 == 0).expect("sent");
                    at += piece;
                }
                peer.close();
            }
        });
        let other_receiver = spawn("other receiver", {
            let peer = peer.clone();
            move || peer.expect(7, LENGTH)
        });
        // The other side closes first or last, as it happens: a direction that was closed does not end the other one.
        let mut sent = ends(sender);
        sent.close_write().expect("closed");
        ends(receiver);
        ends(other_sender);
        ends(other_receiver);
        let changes = key_changes(&peer.raw.lock().expect("whole"));
        // A change after every twenty records, and the answers to those of the other side.
        let least = if rekeys { LENGTH / (20 * (16 << 10)) } else { 0 };
        assert!(changes >= least, "{changes} changes of keys, {rekeys}");
        assert!(rekeys || changes < 10, "{changes} changes of keys");
    }
}

#[test]
fn either_side_may_close_its_direction_first() {
    const SHORT: usize = 300_000;
    for version in [&TLS13, &TLS12] {
        // The peer has sent everything before the first byte is sent to it.
        let (near, far, peer) = connected(version, None);
        peer.send(&pattern(1, 0, SHORT), false).expect("sent");
        peer.close();
        ends(receives(near, 1, SHORT));
        let mut far = ends(sends(far, 2, SHORT));
        far.close_write().expect("closed");
        peer.expect(2, SHORT);
        // The reverse.
        let (near, far, peer) = connected(version, None);
        let mut far = ends(sends(far, 2, SHORT));
        far.close_write().expect("closed");
        peer.expect(2, SHORT);
        let receiver = receives(near, 1, SHORT);
        peer.send(&pattern(1, 0, SHORT), false).expect("sent");
        peer.close();
        ends(receiver);
    }
}

/// How a thread that waited to send has ended, and one that waited to receive.
type Ended = (io::Result<()>, io::Result<usize>);

/// Fills the connection, so that one thread waits to send and another one to receive, and returns how they end after `act` on
/// the waker of both directions, that of the sending one, and the peer.
fn blocked(
    version: &'static SupportedProtocolVersion,
    act: impl FnOnce(&dyn Wake, &dyn Wake, Peer),
) -> (Ended, Duration) {
    let (mut near, mut far, peer) = connected(version, None);
    let (both, sending) = (near.waker(), far.write_waker());
    let written = Arc::new(AtomicU64::new(0));
    let sender = spawn("sender", {
        let written = written.clone();
        move || {
            let bytes = vec![5; 64 << 10];
            loop {
                far.write_all(&bytes)?;
                written.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let receiver = spawn("receiver", move || near.read(&mut [0; 16]));
    let (mut before, start) = (0, Instant::now());
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = written.load(Ordering::Relaxed);
        if now > 0 && now == before {
            break;
        }
        before = now;
        assert!(start.elapsed() < TIMEOUT, "the peer reads nothing, so the sender has to wait");
    }
    assert!(!sender.is_finished() && !receiver.is_finished());
    let begun = Instant::now();
    act(&*both, &*sending, peer);
    ((ends(sender), ends(receiver)), begun.elapsed())
}

#[test]
fn a_wake_ends_both_waits() {
    for version in [&TLS13, &TLS12] {
        let mut held = None;
        let ((sent, received), took) = blocked(version, |both, _, peer| {
            held = Some(peer);
            both.wake();
        });
        sent.expect_err("the connection is shut down");
        // An end or an error: both end the thread.
        assert!(!matches!(received, Ok(1..)), "{received:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}

#[test]
fn a_wake_of_the_sender_leaves_the_receiver_waiting_for_the_reply() {
    for version in [&TLS13, &TLS12] {
        let ((sent, received), _) = blocked(version, |_, sending, peer| {
            sending.wake();
            peer.send(b"K", false).expect("sent");
        });
        sent.expect_err("it is shut down");
        assert_eq!(received.expect("received"), 1);
    }
}

#[test]
fn a_peer_that_ends_while_both_wait_ends_both() {
    for version in [&TLS13, &TLS12] {
        let ((sent, received), took) = blocked(version, |_, _, peer| drop(peer));
        sent.expect_err("the peer is gone");
        assert!(!matches!(received, Ok(1..)), "{received:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}

/// Worn keys of TLS 1.2 end the sending direction with the reason. What the peer has sent can still be read.
#[test]
fn worn_keys_of_tls_1_2_end_only_the_sender() {
    let (near, mut far, peer) = connected(&TLS12, Some(50));
    peer.send(&pattern(3, 0, 100_000), false).expect("sent");
    let error = (0..).find_map(|_| far.write_all(&[7; 16 << 10]).err()).expect("keys are worn out");
    let told = "TLS 1.2 cannot change keys, and 50 records were sent with the keys of this connection";
    assert!(error.to_string().starts_with(told), "{error}");
    peer.close();
    ends(receives(near, 3, 100_000));
}

/// Both directions end: nobody may reply to somebody who has changed bytes in transit.
#[test]
fn a_changed_record_is_an_error_after_the_bytes_before_it() {
    for version in [&TLS13, &TLS12] {
        let (mut near, mut far, peer) = connected(version, None);
        peer.send(b"first", false).expect("sent");
        // A record of application data that no key has made.
        (&*peer.socket).write_all(&[&[0x17, 3, 3, 0, 64][..], &[0; 64]].concat()).expect("sent");
        let mut first = [0; 5];
        near.read_exact(&mut first).expect("received");
        assert_eq!(&first, b"first");
        let error = near.read(&mut first).expect_err("nobody has sent it");
        assert!(error.to_string().contains("TLS: "), "{error}");
        far.write_all(b"more").expect_err("the session has failed");
    }
}

#[test]
fn a_half_does_only_its_own_direction() {
    let (mut near, mut far, _peer) = connected(&TLS13, None);
    let error = near.write(b"x").expect_err("it receives");
    assert_eq!(error.to_string(), "this half of a connection only receives");
    let error = far.read(&mut [0]).expect_err("it sends");
    assert_eq!(error.to_string(), "this half of a connection only sends");
}

/// Its handshake is done with the first bytes that are received, and neither half could do it alone.
#[test]
fn a_destination_cannot_be_split_before_its_handshake_is_done() {
    let folder = tempfile::tempdir().expect("a folder");
    write_both(folder.path()).expect("certificates");
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("bound");
    let address = listener.local_address().to_string();
    let _source = TcpStream::connect(address.trim_start_matches("tcp:")).expect("connected");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    let mut listener = TlsListener::new(Box::new(listener), server);
    let context = Context::new(&Stop::new());
    let link = listener.accept(&context).expect("accepted").expect("a connection");
    assert!(link.can_split());
    let error = link.split().err().expect("refused");
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert!(error.to_string().contains("before its handshake is done"), "{error}");
}
