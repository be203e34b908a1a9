//! A source gets in while other hosts hold hundreds of silent connections and renew them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    SendOptions,
    channel::{Address, Connect, Context, Link, Listener},
    live::MigrateOptions,
    ram::{NeverDirty, PageSize},
};
use multifd_testkit::crowd::{Crowd, Target};

use crate::{
    kit::{Ends, StoppedGuest, difference, fresh, migrate_over},
    loopback::{BLOCKS, filled},
};

/// More than the share of a host.
const CROWD: usize = 340;

/// Waits before its first connection until the crowd has connected.
struct Behind {
    crowds: Vec<Crowd>,
    address: Address,
}

impl Connect for Behind {
    fn connect(&self, context: &Context) -> io::Result<Box<dyn Link>> {
        for crowd in &self.crowds {
            // Some were dropped and made again.
            assert!(crowd.has_made(CROWD as u64, Duration::from_secs(60)), "{} connections", crowd.made());
        }
        self.address.connect(context)
    }

    fn target(&self) -> String {
        self.address.target()
    }
}

fn listener(address: &str) -> (Listener, Address) {
    let listener = Listener::bind(&address.parse().expect("an address")).expect("listening");
    let address = listener.local_address().clone();
    (listener, address)
}

fn crowds(address: &Address, hosts: &[u8]) -> Vec<Crowd> {
    let Address::Tcp { port, .. } = *address else { unreachable!("{address}") };
    let target = |last: &u8| {
        let from = IpAddr::from(Ipv4Addr::new(127, 0, 0, *last));
        Target::Tcp(from, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    };
    hosts.iter().map(|last| Crowd::start(target(last), CROWD).expect("a crowd")).collect()
}

/// The source announces nothing, so the destination must find out which connections are channels.
fn migrate((connector, listener): Ends, what: &str) {
    let (source, destination) = (filled(PageSize::KIB_4), fresh(PageSize::KIB_4, BLOCKS));
    let begun = Instant::now();
    let outcome = migrate_over(
        (connector, listener),
        &source,
        &destination,
        Some(SendOptions::new().channels(8)),
        MigrateOptions::new(),
        &mut NeverDirty,
        &mut StoppedGuest::default(),
    );
    outcome.sent.unwrap_or_else(|error| panic!("{what}: {error}"));
    outcome.received.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(difference(&source, &destination), None, "{what}");
    // Silent connections of other hosts do not delay a sync point until `channels_timeout`.
    assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {:?}", begun.elapsed());
}

/// Regression: a host with 320 silent connections, each replaced when it was dropped, kept every source out.
#[test]
fn a_source_gets_in_while_other_hosts_renew_silent_connections() {
    for hosts in [&[2][..], &[2, 3, 4]] {
        let (listener, address) = listener("tcp:127.0.0.1:0");
        let crowds = crowds(&address, hosts);
        migrate((Arc::new(Behind { crowds, address }), Box::new(listener)), &format!("{hosts:?}"));
    }
}

#[cfg(feature = "tls")]
#[test]
fn a_source_gets_in_while_other_hosts_renew_connections_without_a_handshake() {
    use multifd::channel::tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener};

    let folder = tempfile::tempdir().expect("a folder");
    multifd_testkit::certificates::write_both(folder.path()).expect("certificates");
    let (listener, address) = listener("tcp:127.0.0.1:0");
    let crowds = crowds(&address, &[2, 3]);
    let client = ClientCredentials::load(folder.path(), "127.0.0.1").expect("a source's credentials");
    let server = ServerCredentials::load(folder.path(), Vec::new()).expect("a destination's credentials");
    let connector = TlsConnector::new(Arc::new(Behind { crowds, address }), client);
    migrate((Arc::new(connector), Box::new(TlsListener::new(Box::new(listener), server))), "TLS");
}
