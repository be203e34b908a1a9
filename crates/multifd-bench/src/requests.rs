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
    os::unix::net::UnixStream,
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

/// Connections with somebody in the middle.
pub(crate) struct Relay {
    pub(crate) address: String,
    thread: JoinHandle<Result<()>>,
}

impl Relay {
    fn start(destination: &str, times: &Arc<Latencies>) -> Result<Self> {
        Self::between(destination, times, false)
    }

    /// Listens, and forwards what comes to `destination`. With `preempt`, a second connection carries requested pages.
    pub(crate) fn between(destination: &str, times: &Arc<Latencies>, preempt: bool) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("tcp:{}", listener.local_addr()?);
        let to = destination.to_owned();
        let times = times.clone();
        let thread = spawn(move || {
            let (requests, pages) = joined(&listener, &to)?;
            let requests = spawn(move || requests_in(Chunks::of(requests)));
            let pages = spawn(move || pages_in(Chunks::of(pages)));
            // It begins with the switch, when main is read already.
            let more = if preempt { Some(joined(&listener, &to)?.1) } else { None };
            let urgent = more.map(|chunks| spawn(move || urgent_in(Chunks::of(chunks))));
            let (requests, mut pages) = (ended(requests)?, ended(pages)?);
            for (page, came) in urgent.map(ended).transpose()?.into_iter().flatten() {
                pages.entry(page).or_default().push(came);
            }
            for (page, asked) in requests {
                // A page that passed before its request was not waited for at the source.
                let came = pages.get(&page).into_iter().flatten().filter(|came| **came >= asked).min();
                came.into_iter().for_each(|came| times.add(*came - asked));
            }
            Ok(())
        });
        Ok(Self { address, thread })
    }

    /// Waits for the end of both directions.
    pub(crate) fn end(self) -> Result<()> {
        ended(self.thread)
    }
}

/// Accepts a connection and forwards it. Returns what passes back, and what passes forward.
fn joined(listener: &TcpListener, to: &str) -> Result<(Receiver<Chunk>, Receiver<Chunk>)> {
    let (near, _) = listener.accept()?;
    near.set_nodelay(true)?;
    let far: Box<dyn End> = match to.split_once(':') {
        Some(("unix", path)) => Box::new(UnixStream::connect(path)?),
        _ => {
            let far = TcpStream::connect(to.trim_start_matches("tcp:"))?;
            far.set_nodelay(true)?;
            Box::new(far)
        }
    };
    let ((forward, pages), (back, requests)) = (channel(), channel());
    let (from, into): (Box<dyn End>, _) = (Box::new(near.try_clone()?), far.another()?);
    spawn(move || pass(from, into, &forward));
    spawn(move || pass(far, Box::new(near), &back));
    Ok((requests, pages))
}

/// An end of a connection.
trait End: Read + Write + Send {
    fn another(&self) -> io::Result<Box<dyn End>>;
    fn ends(&self);
}

impl End for TcpStream {
    fn another(&self) -> io::Result<Box<dyn End>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn ends(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl End for UnixStream {
    fn another(&self) -> io::Result<Box<dyn End>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn ends(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

fn ended<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| "a thread panicked")?
}

/// Bytes, and when they passed.
type Chunk = (Instant, Vec<u8>);

/// Forwards bytes as they come, and a copy of them, with the time at which they came, to somebody who reads them later.
fn pass(mut from: Box<dyn End>, mut to: Box<dyn End>, copies: &Sender<Chunk>) {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = from.read(&mut buffer).unwrap_or(0);
        let came = Instant::now();
        if read == 0 || to.write_all(&buffer[..read]).is_err() {
            return to.ends();
        }
        let _ = copies.send((came, buffer[..read].to_vec()));
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

/// The pages, and when each passed.
fn pages_in(chunks: Chunks) -> Result<HashMap<Page, Vec<Instant>>> {
    let mut events = Events::new(chunks);
    let (mut list, mut pages) = (None::<BlockList>, HashMap::<_, Vec<_>>::new());
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
        pages.entry((name.unwrap_or_default(), page.0)).or_default().push(when);
    }
}

/// The pages of a connection for requested pages: records without sections. It ends at any time.
fn urgent_in(mut chunks: Chunks) -> Result<Vec<(Page, Instant)>> {
    let (mut block, mut pages) = (Vec::new(), Vec::new());
    let mut head = [0; 8];
    while chunks.read_exact(&mut head).is_ok() {
        let head = u64::from_be_bytes(head);
        let (offset, flags) = (head & !(PAGE - 1), head & (PAGE - 1));
        if flags & RECORD == 0 {
            continue;
        }
        if flags & CONTINUE == 0 {
            let mut length = [0];
            chunks.read_exact(&mut length)?;
            block = vec![0; usize::from(length[0])];
            chunks.read_exact(&mut block)?;
        }
        let mut contents = vec![0; if flags & ZERO == 0 { 4096 } else { 1 }];
        chunks.read_exact(&mut contents)?;
        pages.push(((block.clone(), offset / PAGE), chunks.when));
    }
    Ok(pages)
}

/// The flags of a record: a page that is zero, any page, and the block of the record before.
const ZERO: u64 = 0x02;
const RECORD: u64 = 0x0a;
const CONTINUE: u64 = 0x20;

const PAGE: u64 = 4096;
