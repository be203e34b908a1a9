//! How long a destination of post-copy waits for a page that it has requested: of a QEMU, and of `multifd send`.
//!
//! ```text
//! source ═══ relay ═══ destination      the relay notes when a request passes, and when its page passes
//! ```
//!
//! Both sources send over one connection, so that the relay sees a request and its page. What the relay adds is the same for both.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{JoinHandle, spawn},
    time::{Duration, Instant},
};

use clap::Args;
use multifd::postcopy::Latencies;
use multifd_testkit::{
    guest::Guest,
    qemu::{PATIENCE, Qemu, VmBuilder},
};
use qemu_stream::{
    error::StreamKind,
    format::{BlockList, Event, Message, Reader},
    incoming::Events,
};
use serde_json::json;

use crate::Result;

#[derive(Debug, Args)]
pub(crate) struct RequestsArgs {
    /// The program to measure
    #[arg(long, default_value = "target/release/multifd")]
    program: PathBuf,
    /// How often each source is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Limit of the pages in the background, in MiB per second
    #[arg(long, default_value_t = 50)]
    background: u64,
}

/// Measures, and prints a table.
pub(crate) fn run(args: &RequestsArgs) -> Result<()> {
    let qemu = Qemu::v10_0().ok_or("this benchmark needs QEMU 10.0")?;
    // It touches all of its 64 MiB again and again.
    let guest = Guest::new().working_set(1 << 14).filled(64).filled_checked(0);
    let vm = || qemu.vm().memory(128 << 20).guest(&guest);
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let file = folder.path().join("machine");
    let (of_qemu, of_ours) = (Arc::<Latencies>::default(), Arc::<Latencies>::default());
    for _ in 0..args.rounds {
        from_qemu(&vm, args.background, &of_qemu)?;
        if !file.exists() {
            capture(&vm, args, &file)?;
        }
        from_file(&vm, args, &file, &of_ours)?;
    }
    println!("| Source | Requests | p50 | p99 |");
    println!("| --- | --- | --- | --- |");
    for (label, times) in [("QEMU 10.0", &of_qemu), ("multifd send --postcopy-ram", &of_ours)] {
        let micros = |per_mille| times.percentile(per_mille).unwrap_or_default().as_micros();
        println!("| {label} | {} | {} µs | {} µs |", times.count(), micros(500), micros(990));
    }
    Ok(())
}

fn from_qemu(vm: &impl Fn() -> VmBuilder, background: u64, times: &Arc<Latencies>) -> Result<()> {
    let mut source = vm().start()?;
    source.wait_round(2, PATIENCE)?;
    let mut to = vm().incoming().start()?;
    for vm in [&mut source, &mut to] {
        vm.set_capabilities(&[("postcopy-ram", true)])?;
    }
    let background = background << 20;
    // Little is sent before the switch.
    source.set_parameters(json!({ "max-bandwidth": 1 << 20, "max-postcopy-bandwidth": background }))?;
    let relay = Relay::start(&to.migrate_incoming("tcp:127.0.0.1:0")?, times)?;
    source.migrate(&relay.address)?;
    source.execute("migrate-start-postcopy", json!({}))?;
    source.wait_migration("completed", PATIENCE)?;
    relay.end()
}

fn capture(vm: &impl Fn() -> VmBuilder, args: &RequestsArgs, file: &std::path::Path) -> Result<()> {
    let mut source = vm().start()?;
    source.wait_round(2, PATIENCE)?;
    source.set_capabilities(&[("multifd", false)])?;
    source.set_parameters(json!({ "max-bandwidth": 0, "downtime-limit": 5000 }))?;
    let socket = file.with_extension("socket");
    let address = format!("unix:{}", socket.display());
    let mut receives = Command::new(&args.program);
    let receives = receives.args(["receive", "--quiet", &address]).arg(file).stdin(Stdio::null());
    let mut receives = receives.stdout(Stdio::null()).spawn()?;
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    source.migrate(&address)?;
    source.wait_migration("completed", PATIENCE)?;
    if receives.wait()?.success() { Ok(()) } else { Err("the guest was not captured".into()) }
}

fn from_file(
    vm: &impl Fn() -> VmBuilder,
    args: &RequestsArgs,
    file: &std::path::Path,
    times: &Arc<Latencies>,
) -> Result<()> {
    let mut to = vm().incoming().start()?;
    to.set_capabilities(&[("postcopy-ram", true)])?;
    let relay = Relay::start(&to.migrate_incoming("tcp:127.0.0.1:0")?, times)?;
    let mut sends = Command::new(&args.program);
    sends.args(["send", "--quiet", "--postcopy-ram", "--no-working-set", "--max-postcopy-bandwidth"]);
    let status = sends.arg(format!("{}M", args.background)).arg(file).arg(&relay.address).status()?;
    if !status.success() {
        return Err(format!("multifd send ended with {status}").into());
    }
    to.wait_migration("completed", PATIENCE)?;
    relay.end()
}

/// A page: the name of its block, and its number.
type Page = (Vec<u8>, u64);

/// A connection with somebody in the middle.
struct Relay {
    address: String,
    thread: JoinHandle<Result<()>>,
}

impl Relay {
    fn start(destination: &str, times: &Arc<Latencies>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        let to = destination.trim_start_matches("tcp:").to_owned();
        let times = times.clone();
        let thread = spawn(move || {
            let (from, _) = listener.accept()?;
            let to = TcpStream::connect(to)?;
            from.set_nodelay(true)?;
            to.set_nodelay(true)?;
            let ((forward, pages), (back, requests)) = (channel(), channel());
            let (near, far) = (from.try_clone()?, to.try_clone()?);
            let passes = [spawn(move || pass(near, far, &forward)), spawn(move || pass(to, from, &back))];
            let requests = spawn(move || requests_in(Chunks::of(requests)));
            let pages = spawn(move || pages_in(Chunks::of(pages)));
            passes.into_iter().try_for_each(ended)?;
            let (requests, pages) = (ended(requests)?, ended(pages)?);
            for (page, asked) in requests {
                // A page that passed before its request was not waited for at the source.
                if let Some(came) = pages.get(&page).filter(|came| **came >= asked) {
                    times.add(*came - asked);
                }
            }
            Ok(())
        });
        Ok(Self { address, thread })
    }

    /// Waits for the end of both directions.
    fn end(self) -> Result<()> {
        ended(self.thread)
    }
}

fn ended<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| "a thread panicked")?
}

/// Bytes, and when they passed.
type Chunk = (Instant, Vec<u8>);

/// Forwards bytes as they come, and a copy of them to somebody who reads them later.
fn pass(mut from: TcpStream, mut to: TcpStream, copies: &Sender<Chunk>) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = from.read(&mut buffer).unwrap_or(0);
        if read == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return Ok(());
        }
        to.write_all(&buffer[..read])?;
        let _ = copies.send((Instant::now(), buffer[..read].to_vec()));
    }
}

/// The bytes that have passed, as a reader. `when` is the time of the last ones that were read.
struct Chunks {
    chunks: Receiver<Chunk>,
    bytes: Vec<u8>,
    at: usize,
    when: Instant,
}

impl Chunks {
    fn of(chunks: Receiver<Chunk>) -> Self {
        Self { chunks, bytes: Vec::new(), at: 0, when: Instant::now() }
    }
}

impl Read for Chunks {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.bytes.len() {
            let Ok((when, bytes)) = self.chunks.recv() else { return Ok(0) };
            (self.when, self.bytes, self.at) = (when, bytes, 0);
        }
        let length = into.len().min(self.bytes.len() - self.at);
        into[..length].copy_from_slice(&self.bytes[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// The requests, and when each passed first.
fn requests_in(chunks: Chunks) -> Result<HashMap<Page, Instant>> {
    let mut reader = Reader::new(chunks, StreamKind::ReturnPath);
    let (mut last, mut requests) = (Vec::new(), HashMap::new());
    while let Some(message) = Message::decode(&mut reader)? {
        let Message::ReqPages { block, start, .. } = message else { continue };
        if let Some(block) = block {
            last = block.as_bytes().to_vec();
        }
        requests.entry((last.clone(), start / PAGE)).or_insert(reader.get_ref().when);
    }
    Ok(requests)
}

/// The pages, and when each passed last.
fn pages_in(chunks: Chunks) -> Result<HashMap<Page, Instant>> {
    let mut events = Events::new(chunks);
    let (mut list, mut pages) = (None::<BlockList>, HashMap::new());
    loop {
        let (block, page) = match events.next()? {
            Event::Blocks { blocks, .. } => {
                list = Some(blocks.clone());
                continue;
            }
            Event::Page { block, page, .. } | Event::ZeroPage { block, page } => (block, page),
            Event::End(_) => return Ok(pages),
            _ => continue,
        };
        let when = events.get_ref().when;
        let name =
            list.as_ref().and_then(|list| list.entry(block)).map(|entry| entry.name.as_bytes().to_vec());
        pages.insert((name.unwrap_or_default(), page.0), when);
    }
}

const PAGE: u64 = 4096;
