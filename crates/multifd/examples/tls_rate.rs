//! One session over TCP on this machine compared with its cipher alone, in turns; prints the medians.
//!
//! `cargo run --release -p multifd --features tls --example tls_rate`

#![expect(clippy::print_stdout, reason = "a program that tells figures")]

use std::{
    error::Error,
    io::{Read, Write},
    sync::Arc,
    thread,
    time::Instant,
};

use multifd::channel::{
    Address, Connect, Context, Listen, Listener, Stop, Stream,
    tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
};
use multifd_testkit::certificates::write_both;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const ROUNDS: usize = 5;
const LENGTH: usize = 2 << 30;
const RECORD: usize = 16 << 10;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_both(folder.path())?;
    let (mut seals, mut opens, mut plains, mut sessions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (seal, open) = cipher()?;
        seals.push(seal);
        opens.push(open);
        let client = ClientCredentials::load(folder.path(), "localhost")?;
        let server = ServerCredentials::load(folder.path(), Vec::new())?;
        plains.push(connection(None)?);
        sessions.push(connection(Some((client, server)))?);
    }
    let [seal, open, plain, session] = [seals, opens, plains, sessions].map(median);
    println!("AES-256-GCM in records of 16 KiB: seal {seal:.2} GB/s, open {open:.2} GB/s");
    println!("one connection over loopback: plain {plain:.2} GB/s, TLS {session:.2} GB/s");
    let cost = session.recip() - plain.recip();
    println!("TLS costs {cost:.3} ns a byte more, the cipher alone {:.3}", seal.min(open).recip());
    Ok(())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn rate(length: usize, start: Instant) -> f64 {
    length as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn cipher() -> Result<(f64, f64)> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| "a key")?);
    let mut record = vec![1; RECORD];
    let count = LENGTH / RECORD / 4;
    let nonce = || Nonce::assume_unique_for_key([3; 12]);
    let start = Instant::now();
    for _ in 0..count {
        let _tag =
            key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut record).map_err(|_| "sealed")?;
    }
    let seal = rate(count * RECORD, start);
    record.fill(1);
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut record).map_err(|_| "sealed")?;
    let mut buffer = vec![0; record.len()];
    let start = Instant::now();
    for _ in 0..count {
        buffer.copy_from_slice(&record);
        key.open_in_place(nonce(), Aad::empty(), &mut buffer).map_err(|_| "opened")?;
    }
    Ok((seal, rate(count * RECORD, start)))
}

fn connection(tls: Option<(ClientCredentials, ServerCredentials)>) -> Result<f64> {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse::<Address>()?)?;
    let address = listener.local_address().clone();
    let (connector, mut listener): (Box<dyn Connect>, Box<dyn Listen>) = match tls {
        Some((client, server)) => (
            Box::new(TlsConnector::new(Arc::new(address), client)),
            Box::new(TlsListener::new(Box::new(listener), server)),
        ),
        None => (Box::new(address), Box::new(listener)),
    };
    let destination = thread::spawn(move || -> Result<usize> {
        let context = Context::new(&Stop::new());
        let mut stream = Stream::new(listener.accept(&context)?.ok_or("no connection")?, &context);
        let (mut buffer, mut received) = (vec![0; 1 << 20], 0);
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(received),
                some => received += some,
            }
        }
    });
    let context = Context::new(&Stop::new()).connect_timeout(TIMEOUT);
    let mut stream = Stream::new(connector.connect(&context)?, &context);
    let chunk = vec![1; 1 << 20];
    let start = Instant::now();
    for _ in 0..LENGTH / chunk.len() {
        stream.write_all(&chunk)?;
    }
    stream.close_write()?;
    let received = destination.join().map_err(|_| "the destination panicked")??;
    assert_eq!(received, LENGTH);
    Ok(rate(LENGTH, start))
}

const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);
