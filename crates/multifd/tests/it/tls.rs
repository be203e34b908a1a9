//! Sessions on every connection: whole machines arrive, and peers that are not allowed are refused.

use std::{
    io,
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use multifd::{
    ChannelCount, Method, ReceiveOptions, Receiver, SendOptions,
    channel::{
        Address, Connect, Context, Host, Link, Listen, Listener, PeerSignal, Stop, Stream, Wake, memory,
        tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
    },
    live::{MigrateOptions, ZeroPageDetection},
    ram::{DirtyBitmaps, NeverDirty, PageIndex, PageSize, Part, PartMut},
};
use multifd_testkit::certificates::{Authority, Subject, write_both};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tempfile::TempDir;

use crate::{
    changing::{ChangingConnector, answer_over},
    kit::{Ends, StoppedGuest, TIMEOUT, difference, fresh, migrate_over, spawn},
    loopback::{BLOCKS, Writers, filled},
};

fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write_both(folder.path()).expect("certificates");
    folder
}

fn ends(client: &Path, server: &Path, name: &str, authz: &[&str]) -> Ends {
    let (connector, listener) = memory::network(1 << 18);
    let client = ClientCredentials::load(client, name).expect("a source's credentials");
    let authz = authz.iter().map(ToString::to_string).collect();
    let server = ServerCredentials::load(server, authz).expect("a destination's credentials");
    (
        Arc::new(TlsConnector::new(Arc::new(connector), client)),
        Box::new(TlsListener::new(Box::new(listener), server)),
    )
}

#[test]
fn a_machine_arrives_whole_over_sessions() {
    let folder = folder();
    for channels in [0, 1, 4] {
        let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
        let send = (channels > 0).then(|| SendOptions::new().channels(channels));
        let options = MigrateOptions::new().zero_page_detection(ZeroPageDetection::Multifd);
        let ends = ends(folder.path(), folder.path(), "localhost", &["O=Test,CN=source"]);
        let guest = &mut StoppedGuest::default();
        let outcome = migrate_over(ends, &source, &destination, send, options, &mut NeverDirty, guest);
        outcome.sent.expect("sent");
        outcome.received.expect("received");
        assert_eq!(difference(&source, &destination), None, "{channels} channels");
    }
}

#[test]
fn a_guest_that_keeps_writing_arrives_over_sessions() {
    let folder = folder();
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let bits = DirtyBitmaps::new(&source);
    let mut log = bits.reader().expect("alone");
    let mut writers = Writers::start(&source, &bits, 600, Duration::from_micros(200));
    let options = MigrateOptions::new().downtime_limit(Duration::from_millis(5));
    let ends = ends(folder.path(), folder.path(), "127.0.0.1", &[]);
    let send = Some(SendOptions::new().channels(4));
    let outcome = migrate_over(ends, &source, &destination, send, options, &mut log, &mut writers);
    outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None);
}

/// Both ends of one connection: the result of the source's handshake, then the result of its peer's first read.
fn meet((connector, mut listener): Ends) -> (Result<(), String>, Result<usize, String>) {
    let told = |error: io::Error| error.to_string();
    let destination = spawn("destination", move || {
        let mut link = listener.accept(&crate::kit::context()).expect("accepted").expect("a connection");
        link.set_recv_timeout(Some(TIMEOUT)).expect("set");
        let mut byte = [0];
        link.recv(&mut [PartMut::from(&mut byte[..])]).map_err(told)
    });
    let source = connector.connect(&crate::kit::context()).and_then(|mut link| {
        link.send(&[Part::from(&b"Q"[..])])?;
        // In TLS 1.3 a source notices its refusal at its next read.
        link.set_recv_timeout(Some(TIMEOUT))?;
        let mut byte = [0];
        link.recv(&mut [PartMut::from(&mut byte[..])]).map(drop)
    });
    (source.map_err(told), destination.join().expect("no panic"))
}

#[track_caller]
fn assert_refused(ends: Ends, source: &str, destination: &str) {
    let (sent, received) = meet(ends);
    let (sent, received) = (sent.expect_err("refused"), received.expect_err("refused"));
    assert!(sent.contains(source), "source: {sent}");
    assert!(received.contains(destination), "destination: {received}");
}

fn authority(folder: &TempDir, name: &str) -> Authority {
    let authority = Authority::new(name).expect("an authority");
    authority.write(folder.path()).expect("written");
    authority
}

fn subject<'a>(name: &'a str, hosts: &'a [&'a str], expired: bool) -> Subject<'a> {
    Subject { organisation: "Test", name, hosts, expired }
}

#[test]
fn both_ends_of_one_authority_meet() {
    let folder = folder();
    let (sent, received) = meet(ends(folder.path(), folder.path(), "localhost", &["O=Test,CN=source"]));
    assert_eq!((sent, received), (Ok(()), Ok(1)));
}

/// Regression: the handshake's limit stayed on the connection, and a source failed if SHUT did not arrive within it.
#[test]
fn a_read_after_the_handshake_waits_longer_than_the_handshake_might() {
    let folder = folder();
    let (connector, mut listener) = ends(folder.path(), folder.path(), "localhost", &[]);
    let destination = spawn("destination", move || {
        let mut link = listener.accept(&crate::kit::context()).expect("accepted").expect("a connection");
        let mut byte = [0];
        link.recv(&mut [PartMut::from(&mut byte[..])]).expect("received");
        std::thread::sleep(Duration::from_millis(700));
        link.send(&[Part::from(&b"K"[..])]).expect("sent");
    });
    let mut link = connector
        .connect(&Context::new(&Stop::new()).connect_timeout(Duration::from_millis(500)))
        .expect("connected");
    link.send(&[Part::from(&b"Q"[..])]).expect("sent");
    let mut byte = [0];
    assert_eq!(link.recv(&mut [PartMut::from(&mut byte[..])]).expect("received"), 1);
    destination.join().expect("no panic");
}

#[test]
fn a_destination_of_another_authority_is_refused() {
    let (ours, theirs) = (folder(), folder());
    assert_refused(
        ends(ours.path(), theirs.path(), "localhost", &[]),
        "our ca-cert.pem does not contain its authority",
        "its ca-cert.pem does not contain the authority of our certificate",
    );
}

#[test]
fn a_destination_of_another_name_is_refused() {
    let folder = folder();
    assert_refused(
        ends(folder.path(), folder.path(), "elsewhere.example", &[]),
        "set tls-hostname to the name in its certificate's subjectAltName",
        "TLS alert",
    );
}

#[test]
fn a_source_of_another_authority_or_without_certificate_is_refused() {
    let server = tempfile::tempdir().expect("a folder");
    let authority = authority(&server, "one");
    authority.sign(server.path(), "server", &subject("destination", &["localhost"], false)).expect("signed");
    let client = tempfile::tempdir().expect("a folder");
    authority.write(client.path()).expect("written");
    let nobody = ends(client.path(), server.path(), "localhost", &[]);
    assert_refused(
        nobody,
        "TLS alert CertificateRequired",
        "the source needs client-cert.pem and client-key.pem in tls-creds",
    );

    // It trusts both authorities; its own certificate is signed by the other one.
    let other = Authority::new("another").expect("an authority");
    let ca = client.path().join("ca-cert.pem");
    let one = std::fs::read_to_string(&ca).expect("read");
    other.write(client.path()).expect("written");
    let another = std::fs::read_to_string(&ca).expect("read");
    std::fs::write(&ca, one + &another).expect("written");
    other.sign(client.path(), "client", &subject("source", &[], false)).expect("signed");
    let stranger = ends(client.path(), server.path(), "localhost", &[]);
    assert_refused(stranger, "TLS alert UnknownCA", "does not contain its authority");
}

/// The refusal is part of the handshake. A name in the other order is a different subject.
#[test]
fn a_source_that_is_not_in_the_list_is_refused_by_its_name() {
    let folder = folder();
    let ends = ends(folder.path(), folder.path(), "localhost", &["O=Test,CN=somebody", "CN=source,O=Test"]);
    let told = r#"the source's subject "O=Test,CN=source" is not in the list of tls-authz"#;
    assert_refused(
        ends,
        "TLS alert AccessDenied: check that its tls-authz lists our certificate's subject",
        told,
    );
}

#[test]
fn a_certificate_that_was_taken_back_is_refused() {
    let folder = folder();
    let authority = authority(&folder, "one");
    authority.sign(folder.path(), "server", &subject("destination", &["localhost"], false)).expect("signed");
    authority.sign(folder.path(), "client", &subject("source", &[], false)).expect("signed");
    authority.take_back(folder.path(), "client", false).expect("written");
    assert_refused(ends(folder.path(), folder.path(), "localhost", &[]), "CertificateRevoked", "Revoked");
    authority.take_back(folder.path(), "server", false).expect("written");
    assert_refused(ends(folder.path(), folder.path(), "localhost", &[]), "Revoked", "CertificateRevoked");
}

/// This is detected when the files are read, not by the peer.
#[test]
fn our_own_certificate_and_list_must_be_good_now() {
    let folder = folder();
    let path = folder.path();
    let authority = authority(&folder, "one");
    let told = |role: &str| {
        let loaded = match role {
            "server" => ServerCredentials::load(path, Vec::new()).map(drop),
            _ => ClientCredentials::load(path, "localhost").map(drop),
        };
        loaded.err().map(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            format!("{error}: {cause}")
        })
    };
    for role in ["server", "client"] {
        let hosts: &[&str] = if role == "server" { &["localhost"] } else { &[] };
        let refused = |why: &str| {
            let found = told(role).expect("refused");
            assert!(found.contains(why), "{role}: {found}");
        };
        // Signed by the authority that was here before.
        refused(&format!(
            "{role}-cert.pem: it was not issued by the authority in the ca-cert.pem of its folder"
        ));
        authority.sign(path, role, &subject(role, hosts, true)).expect("signed");
        refused(&format!("{role}-cert.pem: it has expired"));
        authority.sign(path, role, &subject(role, hosts, false)).expect("signed");
        assert_eq!(told(role), None);
        authority.take_back(path, "nobody", true).expect("written");
        refused("ca-crl.pem: it is out of date");
        std::fs::remove_file(path.join("ca-crl.pem")).expect("removed");
    }
}

/// A connection that records what it sends.
struct Tapped(Box<dyn Link>, Arc<Mutex<Vec<u8>>>);

impl Link for Tapped {
    fn is_readable(&mut self) -> io::Result<bool> {
        self.0.is_readable()
    }

    fn peer_signal(&self) -> io::Result<Option<PeerSignal>> {
        self.0.peer_signal()
    }

    fn host(&self) -> Option<Host> {
        self.0.host()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.0.finish()
    }

    fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let sent = self.0.send(parts)?;
        let mut kept = self.1.lock().expect("whole");
        let (end, mut bytes) = (kept.len() + sent, Vec::new());
        for part in parts {
            bytes.resize(part.len(), 0);
            part.copy_to(&mut bytes);
            kept.extend(&bytes);
        }
        kept.truncate(end);
        Ok(sent)
    }
    fn recv(&mut self, parts: &mut [PartMut<'_>]) -> io::Result<usize> {
        self.0.recv(parts)
    }
    fn set_recv_timeout(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.0.set_recv_timeout(limit)
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.0.waker()
    }
    fn send_waker(&self) -> Arc<dyn Wake> {
        self.0.send_waker()
    }
    fn recv_waker(&self) -> Arc<dyn Wake> {
        self.0.recv_waker()
    }
    fn peer(&self) -> String {
        self.0.peer()
    }
    fn close_send(&mut self) -> io::Result<()> {
        self.0.close_send()
    }
}

/// Both directions of one connection in memory.
#[derive(Clone, Default)]
struct Tap([Arc<Mutex<Vec<u8>>>; 2]);

struct TapConnector(memory::MemoryConnector, Tap);
struct TapListener(memory::MemoryListener, Tap);

impl Connect for TapConnector {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        Ok(Box::new(Tapped(self.0.connect(context)?, self.1.0[0].clone())))
    }
    fn target(&self) -> String {
        self.0.target()
    }
}

impl Listen for TapListener {
    fn accept(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        let tap = self.1.0[1].clone();
        Ok(self.0.accept(context)?.map(|link| Box::new(Tapped(link, tap)) as _))
    }
    fn accept_waiting(&mut self, context: &Context) -> io::Result<Option<Box<dyn Link>>> {
        self.0.accept_waiting(context)
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.0.waker()
    }
    fn address(&self) -> String {
        self.0.address()
    }
}

/// The number of records of this length in one direction: in TLS 1.3 only the length is visible.
fn records(bytes: &[u8], length: usize) -> usize {
    let (mut rest, mut count) = (bytes, 0);
    while let [_, _, _, high, low, behind @ ..] = rest {
        let found = usize::from(u16::from_be_bytes([*high, *low]));
        count += usize::from(rest[0] == 0x17 && found == length);
        rest = behind.get(found..).unwrap_or_default();
    }
    count
}

/// The length of a change of keys: message type, three bytes of length, one of content, the record's type, the cipher's
/// tag.
const KEY_UPDATE: usize = 5 + 1 + 16;
/// A closing alert.
const ALERT: usize = 2 + 1 + 16;

#[test]
fn keys_change_in_both_directions_and_nothing_is_lost() {
    const LENGTH: usize = 8 << 20;
    let (folder, tap) = (folder(), Tap::default());
    let (connector, listener) = memory::network(1 << 18);
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials").rekey_after(20);
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials").rekey_after(50);
    let connector = TlsConnector::new(Arc::new(TapConnector(connector, tap.clone())), client);
    let mut listener = TlsListener::new(Box::new(TapListener(listener, tap.clone())), server);
    let pattern: Vec<u8> = (0..=250).cycle().take(LENGTH).collect();
    let expected = pattern.clone();
    let destination = spawn("destination", move || {
        let mut stream = Stream::new(
            listener.accept(&crate::kit::context()).expect("accepted").expect("a connection"),
            &crate::kit::context(),
        );
        let mut received = vec![0; LENGTH];
        stream.read_exact(&mut received).expect("received");
        stream.write_all(&received).expect("sent back");
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
    });
    let mut stream =
        Stream::new(connector.connect(&crate::kit::context()).expect("connected"), &crate::kit::context());
    stream.write_all(&pattern).expect("sent");
    let mut received = vec![0; LENGTH];
    stream.read_exact(&mut received).expect("received");
    assert!(received == expected, "what was sent came back");
    stream.close_write().expect("closed");
    destination.join().expect("no panic");
    // 512 records each, in calls of eight, and the answers to the other side's changes so far.
    let changes = tap.0.each_ref().map(|sent| records(&sent.lock().expect("whole"), KEY_UPDATE));
    assert!(changes[0] >= 30 && changes[1] >= 10, "{changes:?}");
    let alerts = tap.0.each_ref().map(|sent| records(&sent.lock().expect("whole"), ALERT));
    assert_eq!(alerts, [1, 1], "both say that they close");
}

#[test]
fn a_machine_arrives_whole_though_keys_change_all_the_time() {
    let folder = folder();
    let (connector, listener) = memory::network(1 << 18);
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials").rekey_after(1);
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials").rekey_after(1);
    let ends: Ends = (
        Arc::new(TlsConnector::new(Arc::new(connector), client)),
        Box::new(TlsListener::new(Box::new(listener), server)),
    );
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let (options, guest) = (MigrateOptions::new(), &mut StoppedGuest::default());
    let send = Some(SendOptions::new().channels(3));
    let outcome = migrate_over(ends, &source, &destination, send, options, &mut NeverDirty, guest);
    outcome.sent.expect("sent");
    outcome.received.expect("received");
    assert_eq!(difference(&source, &destination), None);
}

/// A destination that supports only TLS 1.2: its session ends before its keys are worn out, with the reason.
#[test]
fn tls_1_2_ends_where_keys_would_have_to_change() {
    let folder = folder();
    let read = |name: &str| std::fs::read(folder.path().join(name)).expect("read");
    let chain = CertificateDer::pem_slice_iter(&read("server-cert.pem")).collect::<Result<_, _>>();
    let key = PrivateKeyDer::from_pem_slice(&read("server-key.pem")).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("TLS 1.2")
        .with_no_client_auth()
        .with_single_cert(chain.expect("a chain"), key)
        .expect("a certificate");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = format!("tcp:{}", listener.local_addr().expect("an address")).parse::<Address>();
    let destination = spawn("destination", move || {
        let (mut socket, _) = listener.accept().expect("accepted");
        let mut session = rustls::ServerConnection::new(Arc::new(config)).expect("a session");
        io::copy(&mut rustls::Stream::new(&mut session, &mut socket), &mut io::sink())
    });
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials").rekey_after(100);
    let connector = TlsConnector::new(Arc::new(address.expect("so")), client);
    let mut stream =
        Stream::new(connector.connect(&crate::kit::context()).expect("connected"), &crate::kit::context());
    stream.write_all(&vec![7; 96 * (16 << 10)]).expect("keys are good for this");
    let error = stream.write_all(&vec![7; 128 << 10]).expect_err("keys are worn out");
    let told = "TLS 1.2 cannot change keys, and 96 records were sent with the keys of this connection";
    assert!(error.to_string().starts_with(told), "{error}");
    drop(stream);
    let received = destination.join().expect("no panic");
    assert!(received.as_ref().map_or(true, |received| *received == 96 * (16 << 10)), "{received:?}");
}

/// The destination's result when a packet of the source is changed in transit.
fn changed(method: Method, change: fn(&mut Vec<u8>)) -> String {
    let folder = folder();
    let (connector, listener) = memory::network(1 << 22);
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    let ends: Ends = (
        Arc::new(TlsConnector::new(Arc::new(ChangingConnector(connector, change)), client)),
        Box::new(TlsListener::new(Box::new(listener), server)),
    );
    let (answer, destination) = answer_over(ends, method, None);
    let untouched = destination.iter().all(|(_, block)| {
        (0..block.pages()).all(|page| block.slice(PageIndex(page), 1).expect("there").is_zero())
    });
    assert!(untouched, "{method}: nothing of it is written");
    let error = answer.expect_err("refused");
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// The first byte of a record of application data: it is neither part of the handshake nor sent before it.
const DATA: u8 = 0x17;

#[test]
fn a_flipped_bit_or_a_cut_in_a_session_is_refused_with_its_channel() {
    for method in Method::ALL {
        let told = changed(*method, |bytes| {
            if bytes[0] == DATA {
                bytes[1000] ^= 4;
            }
        });
        assert!(told.starts_with("channel 0: ") && told.contains("TLS: "), "{method}: {told}");
        let told = changed(*method, |bytes| {
            if bytes[0] == DATA {
                bytes.truncate(1000);
            }
        });
        assert!(told.starts_with("channel 0: "), "{method}: {told}");
    }
}

#[test]
fn whoever_does_not_speak_tls_is_told_of_it_on_both_sides() {
    let folder = folder();
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    let (connector, listener) = memory::network(1 << 16);
    let plain_source: Ends = (Arc::new(connector), Box::new(TlsListener::new(Box::new(listener), server)));
    let (_, received) = meet(plain_source);
    let told = received.expect_err("refused");
    assert!(told.contains("check that the other side uses TLS (tls-creds)"), "{told}");

    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials");
    let (connector, listener) = memory::network(1 << 16);
    let plain_destination: Ends =
        (Arc::new(TlsConnector::new(Arc::new(connector), client)), Box::new(listener));
    let (sent, _) = meet(plain_destination);
    let told = sent.expect_err("refused");
    assert!(told.contains("the other side closed the connection during the TLS handshake"), "{told}");
}

#[test]
fn a_handshake_that_dribbles_or_stands_still_ends_at_its_limit() {
    let folder = folder();
    let (connector, listener) = memory::network(1 << 16);
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    let options = ReceiveOptions::new()
        .channels(ChannelCount::Exact(1))
        .greeting_timeout(Duration::from_millis(300))
        .channels_timeout(Duration::from_millis(600));
    let mut receiver = Receiver::new(options, Stop::new());
    receiver.listen(Box::new(TlsListener::new(Box::new(listener), server))).expect("listening");
    let mut link = connector.connect(&crate::kit::context()).expect("connected");
    let start = Instant::now();
    // The head of a record that announces more bytes than ever arrive.
    let hello = [0x16, 0x03, 0x01, 0x02, 0x00];
    for byte in hello.iter().chain([&0; 400]) {
        if link.send(&[Part::from(&[*byte][..])]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    link.set_recv_timeout(Some(TIMEOUT)).expect("set");
    let mut rest = [0; 64];
    while matches!(link.recv(&mut [PartMut::from(&mut rest[..])]), Ok(1..)) {}
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn a_stop_ends_a_handshake() {
    let folder = folder();
    let (connector, listener) = memory::network(1 << 16);
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials");
    let connector = TlsConnector::new(Arc::new(connector), client);
    let stop = Stop::new();
    let handshake = spawn("source", {
        let stop = stop.clone();
        move || connector.connect(&Context::new(&stop).connect_timeout(Duration::from_secs(600))).map(drop)
    });
    let mut listener: Box<dyn Listen> = Box::new(listener);
    let link = listener.accept(&crate::kit::context()).expect("accepted");
    stop.cancel();
    handshake.join().expect("no panic").expect_err("cancelled");
    drop(link);
}

#[test]
fn files_that_are_not_there_or_do_not_fit_are_named() {
    let folder = folder();
    let chain = |error: &dyn std::error::Error| {
        format!("{error}: {}", error.source().map_or_else(String::new, ToString::to_string))
    };
    let refused = |name: &str| {
        let error = ServerCredentials::load(folder.path(), Vec::new()).expect_err("refused");
        let told = chain(&error);
        assert!(told.contains(name), "{told}");
    };
    let key = folder.path().join("server-key.pem");
    std::fs::copy(folder.path().join("client-key.pem"), &key).expect("copied");
    refused("server-key.pem");
    std::fs::remove_file(&key).expect("removed");
    refused("No such file");
    std::fs::write(folder.path().join("server-cert.pem"), "nothing").expect("written");
    refused("server-cert.pem: it contains no certificate");
    std::fs::remove_file(folder.path().join("ca-cert.pem")).expect("removed");
    refused("No such file");
    let error = ClientCredentials::load(folder.path(), "no host").expect_err("refused");
    assert_eq!(error.to_string(), r#"tls-hostname: expected a host name or an IP address, found "no host""#);
}

#[test]
fn debug_text_of_credentials_leaves_out_certificates_and_keys() {
    let folder = folder();
    let client = ClientCredentials::load(folder.path(), "localhost").expect("credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    assert_eq!(format!("{client:?}"), r#"ClientCredentials { name: DnsName("localhost"), .. }"#);
    assert_eq!(format!("{server:?}"), "ServerCredentials { .. }");
}

/// More than 64 GiB through one session have broken other implementations; keys are changed before 256 GiB. `cargo test
/// --release` shows the rate with `--nocapture`.
#[test]
#[ignore = "slow: moves 300 GiB"]
fn three_hundred_gib_pass_one_session() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: u64 = 300 << 10;
    let folder = folder();
    let client = ClientCredentials::load(folder.path(), "127.0.0.1").expect("credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("credentials");
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse::<Address>().expect("an address")).expect("bound");
    let address = listener.local_address().clone();
    let mut listener = TlsListener::new(Box::new(listener), server);
    let destination = spawn("destination", move || {
        let mut link = listener.accept(&crate::kit::context()).expect("accepted").expect("a connection");
        let (mut buffer, mut received) = (vec![0; CHUNK], 0_u64);
        loop {
            match link.recv(&mut [PartMut::from(&mut *buffer)]).expect("received") {
                0 => return received,
                some => {
                    // Every byte contains its position in the stream, modulo a chunk.
                    let at = usize::try_from(received % 251).expect("small");
                    assert_eq!(usize::from(buffer[0]), at, "at {received}");
                    received += some as u64;
                }
            }
        }
    });
    let connector = TlsConnector::new(Arc::new(address), client);
    let mut link = connector.connect(&crate::kit::context()).expect("connected");
    // 251 does not divide a chunk: two periods, sent from the present position in the stream.
    let pattern: Vec<u8> = (0..=250).cycle().take(CHUNK + 251).collect();
    let (start, mut sent) = (Instant::now(), 0_u64);
    while sent < CHUNKS * CHUNK as u64 {
        let at = usize::try_from(sent % 251).expect("small");
        sent += link.send(&[Part::from(&pattern[at..at + CHUNK])]).expect("sent") as u64;
    }
    link.close_send().expect("closed");
    assert_eq!(destination.join().expect("no panic"), sent);
    let rate = sent as f64 / start.elapsed().as_secs_f64() / 1e9;
    println!("{sent} bytes in {:?}: {rate:.2} GB/s", start.elapsed());
}
