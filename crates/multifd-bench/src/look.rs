//! What it costs to export and to search the memory of a stored guest, beside `dd` and volatility3's layer for streams of QEMU.
//!
//! ```text
//! RAM, three quarters of it with data ── QEMU ── stream ─┬─ volatility3: read all, write it; search it
//!                                          │             └─ multifd export, find
//!                                          └─ mapped-ram file ── multifd export, find
//! the same bytes in a plain file ── dd into a file, dd into nothing
//! ```
//!
//! Every figure is that of a whole process, from its start to its end, with files in the page cache. The exported files are compared
//! with the memory. QEMU writes the stream for machine type 7.2, because volatility3 does not read that of 10.0.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use clap::Args;
use multifd_testkit::qemu::{PATIENCE, Qemu};
use serde_json::json;

use crate::Result;

#[derive(Debug, Args)]
pub(crate) struct LookArgs {
    /// The program that is measured
    #[arg(long)]
    program: PathBuf,
    /// RAM in MiB
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// How often everything is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where the files are: as much room as four times the RAM
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
}

/// What is measured.
struct Row {
    name: &'static str,
    command: Command,
    /// The file that it makes, to be compared with the memory.
    makes: Option<PathBuf>,
    times: Vec<Duration>,
}

/// Measures, and prints a table.
pub(crate) fn run(args: &LookArgs) -> Result<()> {
    let folder = tempfile::tempdir_in(&args.folder)?;
    let path = |name: &str| folder.path().join(name);
    let memory = path("memory");
    fill(&memory, args.memory << 20)?;
    store(args, &memory, &path("stream"))?;
    let stored = Command::new(&args.program).arg("merge").args([path("stream"), path("mapped")]).output()?;
    if !stored.status.success() {
        return Err(String::from_utf8_lossy(&stored.stderr).into());
    }
    let has_volatility = Command::new("python3").args(["-c", "import volatility3"]).output();
    let has_volatility = has_volatility.is_ok_and(|output| output.status.success());
    if !has_volatility {
        eprintln!("volatility3 is not installed for python3: its rows are left out");
    }
    let mut rows = rows(args, folder.path(), has_volatility);
    for round in 0..args.rounds {
        for row in &mut rows {
            row.run(&memory).map_err(|error| format!("{}: {error}", row.name))?;
            eprintln!("round {}: {}: {:.3} s", round + 1, row.name, row.median().as_secs_f64());
        }
    }
    print(args, &rows);
    Ok(())
}

/// RAM in a file: three quarters with data, in runs of 192 pages.
fn fill(path: &Path, length: u64) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    let mut word = 1_u64;
    for page in 0..length / PAGE.len() as u64 {
        if page % 256 < 64 {
            out.write_all(&PAGE)?;
            continue;
        }
        for _ in 0..PAGE.len() / 8 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            out.write_all(&word.to_be_bytes())?;
        }
    }
    out.flush()
}

/// QEMU writes a stream of a machine with this RAM, which it maps.
fn store(args: &LookArgs, memory: &Path, stream: &Path) -> Result<()> {
    let qemu = Qemu::v10_0().ok_or("no QEMU 10.0: cargo xtask qemu fetches it")?;
    let mut vm = qemu
        .vm()
        .machine("pc-q35-7.2,memory-backend=pc.ram")
        .memory(args.memory << 20)
        .args(["-object".to_owned(), {
            let (path, length) = (memory.display(), args.memory);
            // Not shared: what firmware writes stays in the machine.
            format!("memory-backend-file,id=pc.ram,mem-path={path},size={length}M,share=off")
        }])
        .paused()
        .start()?;
    vm.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }))?;
    vm.migrate(&format!("exec:cat > {}", stream.display()))?;
    vm.wait_migration("completed", PATIENCE)?;
    Ok(())
}

fn rows(args: &LookArgs, folder: &Path, has_volatility: bool) -> Vec<Row> {
    let path = |name: &str| folder.join(name);
    let dd = |out: &Path, options: &[&str]| {
        let mut dd = Command::new("dd");
        let (from, to) = (format!("if={}", path("memory").display()), format!("of={}", out.display()));
        dd.args([from, to, "bs=1M".to_owned()]).args(options);
        dd
    };
    let multifd = |verb: &str, words: &[&str], files: &[PathBuf]| {
        let mut program = Command::new(&args.program);
        program.arg(verb).args(words).args(files).env("TMPDIR", folder);
        program
    };
    let volatility = |words: &[&str]| {
        let mut python = Command::new("python3");
        python.args(["-c", VOLATILITY]).arg(path("stream")).args(words);
        python
    };
    let out = path("out");
    let to_out = out.display().to_string();
    let export = |from: &str| {
        multifd(
            "export",
            &["--quiet", "--force", "--no-verify", "--format", "raw"],
            &[path(from), out.clone()],
        )
    };
    let find = |from: &str| multifd("find", &["--json", "--no-verify", "--text", ABSENT], &[path(from)]);
    let row = |name, command, makes: bool| Row {
        name,
        command,
        makes: makes.then(|| out.clone()),
        times: Vec::new(),
    };
    let mut rows = vec![
        row(NAMES[0], dd(&out, &["conv=fsync"]), true),
        row(NAMES[1], export("mapped"), true),
        row(NAMES[2], export("stream"), true),
    ];
    if has_volatility {
        rows.push(row(NAMES[3], volatility(&["export", &to_out]), true));
    }
    rows.extend([
        row(NAMES[4], dd(Path::new("/dev/null"), &[]), false),
        row(NAMES[5], find("mapped"), false),
        row(NAMES[6], find("stream"), false),
    ]);
    if has_volatility {
        rows.push(row(NAMES[7], volatility(&["find", ABSENT]), false));
    }
    rows
}

impl Row {
    fn run(&mut self, memory: &Path) -> Result<()> {
        if let Some(out) = &self.makes {
            let _ = fs::remove_file(out);
        }
        let start = Instant::now();
        let ended = self.command.stdin(Stdio::null()).output()?;
        let time = start.elapsed();
        // `find` reports with 1 that nothing was found.
        if !matches!(ended.status.code(), Some(0 | 1)) || self.makes.is_some() && !ended.status.success() {
            return Err(String::from_utf8_lossy(&ended.stderr).into());
        }
        if let Some(out) = &self.makes
            && !Command::new("cmp").args([out.as_path(), memory]).status()?.success()
        {
            return Err("the exported memory differs from that of the machine".into());
        }
        self.times.push(time);
        Ok(())
    }

    fn median(&self) -> Duration {
        let mut times = self.times.clone();
        times.sort();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

fn print(args: &LookArgs, rows: &[Row]) {
    let bytes = args.memory as f64 * f64::from(1 << 20);
    let median = |name: &str| rows.iter().find(|row| row.name == name).map(|row| row.median().as_secs_f64());
    println!(
        "{} MiB of RAM, three quarters of it with data, in {}: medians of {} rounds\n",
        args.memory,
        args.folder.display(),
        args.rounds
    );
    println!("| | Time | GB/s | of dd | of volatility3 |\n| --- | ---: | ---: | ---: | ---: |");
    for row in rows {
        let time = row.median().as_secs_f64();
        let is_export = NAMES.iter().position(|name| *name == row.name).is_some_and(|at| at < 4);
        let (dd, volatility) = if is_export { (NAMES[0], NAMES[3]) } else { (NAMES[4], NAMES[7]) };
        let mut line = format!("| {} | {:.0} ms | {:.2} |", row.name, time * 1e3, bytes / time / 1e9);
        for peer in [dd, volatility] {
            let _ = match median(peer).filter(|_| peer != row.name) {
                Some(peer) => write!(line, " {:.2} × |", peer / time),
                None => write!(line, " |"),
            };
        }
        println!("{line}");
    }
}

/// A page of zeros.
const PAGE: [u8; 4096] = [0; 4096];
/// A text that is not in the memory.
const ABSENT: &str = "this text is not in the memory of any guest";
/// The rows of the table. The first half is about export.
const NAMES: [&str; 8] = [
    "`dd` of the memory, with `fsync`",
    "`export` of a mapped-ram file",
    "`export` of the stream",
    "volatility3, layer of the stream written",
    "`dd` of the memory into nothing",
    "`find` in a mapped-ram file",
    "`find` in the stream",
    "volatility3, layer of the stream searched",
];
/// Uses the layer as plugins do, without the search for a kernel that comes before them.
const VOLATILITY: &str = r"
import pathlib, sys
from volatility3.framework import contexts
from volatility3.framework.layers import physical, qemu
from volatility3.framework.layers.scanners import BytesScanner
stream, what, argument = sys.argv[1:4]
context = contexts.Context()
context.config['file.location'] = pathlib.Path(stream).resolve().as_uri()
context.add_layer(physical.FileLayer(context, 'file', 'file'))
context.config['qemu.base_layer'] = 'file'
layer = qemu.QemuSuspendLayer(context, 'qemu', 'qemu')
context.add_layer(layer)
end, step = layer.maximum_address + 1, 1 << 20
if what == 'export':
    with open(argument, 'wb') as out:
        for at in range(0, end, step):
            out.write(layer.read(at, min(step, end - at), pad=True))
else:
    print(list(layer.scan(context, BytesScanner(argument.encode()))))
";
