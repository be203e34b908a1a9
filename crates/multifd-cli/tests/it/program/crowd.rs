//! `receive` while others hold hundreds of silent connections and renew them: the source gets in and finishes, and
//! `receive` uses a bounded number of threads and descriptors, and bounded memory.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use multifd_testkit::{
    certificates::write_both,
    crowd::{Crowd, Target},
};
use rustix::process::Pid;

use crate::kit::{Program, captured, feed, folder, multifd_in, path, stored_memory};

/// More than the share of a host, and many times renewed.
const CROWD: usize = 340;
const RENEWED: u64 = 2000;
/// Connections of one host that wait at once, of all hosts, and of all with every channel and some that are closing.
const SHARE: usize = 320;
const OUTSIDE: usize = 512;
/// The program's own threads and descriptors.
const OWN: usize = 40;
/// Threads of connections that were dropped and that a busy machine has not ended yet.
const ENDING: usize = 256;
/// Far less than the default limits of a thread's stack would take.
const MEMORY: u64 = 256 << 20;

struct Used {
    threads: usize,
    descriptors: usize,
    resident: u64,
}

fn used(pid: Pid) -> Used {
    let of = |what: &str| format!("/proc/{}/{what}", pid.as_raw_nonzero());
    let count = |what: &str| fs::read_dir(of(what)).map_or(0, Iterator::count);
    let status = fs::read_to_string(of("status")).unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a size");
    Used { threads: count("task"), descriptors: count("fd"), resident: kib << 10 }
}

/// The crowd from these hosts; over a unix socket from this process.
fn crowds(address: &str, hosts: &[u8]) -> Vec<Crowd> {
    let target = |last: &u8| match address.strip_prefix("unix:") {
        Some(path) => Target::Unix(path.into()),
        None => {
            let port = address.rsplit_once(':').expect("a port").1.parse().expect("a port");
            let from = IpAddr::from(Ipv4Addr::new(127, 0, 0, *last));
            Target::Tcp(from, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        }
    };
    hosts.iter().map(|last| Crowd::start(target(last), CROWD).expect("a crowd")).collect()
}

#[track_caller]
fn assert_gets_in(listen: &str, hosts: &[u8], tls: Option<&Path>) {
    let folder = folder();
    let (from, file) = (captured(&folder, 8 << 20), path(&folder, "machine"));
    let (receive, address) = {
        let creds = tls.map(|creds| creds.to_str().expect("text"));
        let options: Vec<&str> = creds.iter().flat_map(|creds| ["--tls-creds", creds]).collect();
        let listen = listen.replace("FOLDER", folder.path().to_str().expect("text"));
        Program::receive(&options, &listen, &file)
    };
    let crowds = crowds(&address, hosts);
    let most = OUTSIDE.min(SHARE * hosts.len()) + ENDING;
    let begun = Instant::now();
    while crowds.iter().any(|crowd| crowd.made() < RENEWED) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{crowds:?}");
        let Used { threads, descriptors, resident } = used(receive.pid());
        assert!(
            threads < most + OWN && descriptors < most + OWN,
            "{threads} threads, {descriptors} descriptors"
        );
        assert!(resident < MEMORY, "{resident} bytes");
        sleep(Duration::from_millis(5));
    }
    let begun = Instant::now();
    let creds = tls.map(|creds| creds.to_str().expect("text"));
    let options: Vec<&str> = creds.iter().flat_map(|creds| ["--tls-creds", creds]).collect();
    let options = [&["--multifd-channels", "8"][..], &options].concat();
    feed(&options, &from, &address).done();
    let Used { threads, descriptors, resident } = used(receive.pid());
    println!(
        "{address} {hosts:?}: got in and finished in {:?}; {threads} threads, {descriptors} descriptors, peak of {} KiB",
        begun.elapsed(),
        resident >> 10
    );
    let ended = receive.done();
    drop(crowds);
    assert_eq!(stored_memory(&file), stored_memory(&from));
    let lines = ended.stderr.lines().filter(|line| line.contains("too many connections")).count();
    assert!((1..40).contains(&lines), "the log is not filled: {lines} lines");
}

/// Regression: a host with 320 silent connections, each replaced when it was dropped, kept every source out.
#[test]
fn source_gets_in_while_other_hosts_renew_silent_connections() {
    assert_gets_in("tcp:127.0.0.1:0", &[2], None);
    assert_gets_in("tcp:127.0.0.1:0", &[2, 3, 4], None);
}

#[test]
fn source_gets_in_while_its_own_host_renews_silent_connections() {
    // The source announces its channels, so none of the silent connections can be one of them.
    assert_gets_in("tcp:127.0.0.1:0", &[1], None);
}

#[test]
fn source_gets_in_while_other_hosts_renew_connections_without_a_handshake() {
    let folder = folder();
    write_both(folder.path()).expect("certificates");
    assert_gets_in("tcp:127.0.0.1:0", &[2], Some(folder.path()));
    assert_gets_in("tcp:127.0.0.1:0", &[2, 3, 4], Some(folder.path()));
}

/// There are no hosts: the connections of a user share.
#[test]
fn source_gets_in_over_a_unix_socket_while_another_process_renews_silent_connections() {
    assert_gets_in("unix:FOLDER/socket", &[0], None);
}

/// Regression: silent connections took all descriptors, and `receive` failed.
#[test]
fn source_gets_in_while_silent_connections_take_all_descriptors() {
    let folder = folder();
    let (from, file) = (captured(&folder, 8 << 20), path(&folder, "machine"));
    let arguments = ["receive", "tcp:127.0.0.1:0", file.to_str().expect("text")];
    let receive = Program::start(&mut multifd_in(&[], "ulimit -n 128", &arguments));
    let address = receive.listening();
    let crowds = crowds(&address, &[2]);
    assert!(crowds.iter().all(|crowd| crowd.has_made(CROWD as u64, Duration::from_secs(60))), "{crowds:?}");
    let begun = Instant::now();
    feed(&[], &from, &address).done();
    println!("with 128 descriptors: got in and finished in {:?}", begun.elapsed());
    receive.done();
    assert_eq!(stored_memory(&file), stored_memory(&from));
}
