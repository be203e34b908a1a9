//! `microvm demo`: moves a machine to a second process, or runs a second one out of its capture, and checks it there.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use crate::{
    DemoArgs, Failure,
    control::{ask, number, value},
    tell,
};

/// A process with a machine, which runs this program. It ends with the demo, on every path.
struct Process(Child, BufReader<ChildStdout>);

impl Process {
    /// Starts one, and waits for the line that says it is ready.
    fn start(args: &[&str]) -> Result<(Self, String), Failure> {
        let mut child = Command::new(std::env::current_exe()?).args(args).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or("the process has no output")?;
        let mut process = Self(child, BufReader::new(out));
        let line = process.line()?;
        Ok((process, line))
    }

    /// Its next line.
    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        if self.1.read_line(&mut line)? == 0 {
            return Err("the process has ended before it was ready".into());
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("microvm-demo-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let done = match args.snapshot {
        true => twins(args, &folder),
        false => between(args, &folder),
    };
    let _ = std::fs::remove_dir_all(&folder);
    done
}

fn between(args: &DemoArgs, folder: &std::path::Path) -> Result<(), Failure> {
    let (here, there) = (folder.join("source"), folder.join("destination"));
    let (here_text, there_text) = (here.display().to_string(), there.display().to_string());
    let (size, rate) = (args.guest.size.to_string(), args.guest.rate.to_string());
    tell(&format!(
        "a guest of {} MiB begins to rewrite {} MB/s",
        args.guest.size >> 20,
        args.guest.rate / 1_000_000
    ));
    let mut source = vec!["run", "--control", &here_text, "--size", &size, "--rate", &rate];
    let mut destination = vec!["incoming", "--control", &there_text];
    let socket = format!("unix:{}", folder.join("memory").display());
    if args.local {
        source.push("--shared");
        destination.extend(["--local", &socket]);
    } else {
        if args.how.postcopy.is_some() {
            destination.push("--postcopy");
        }
        if args.how.channels_may_break {
            destination.push("--channels-may-break");
        }
        destination.push("tcp:127.0.0.1:0");
    }
    let (_source, _) = Process::start(&source)?;
    let (mut destination, line) = Process::start(&destination)?;
    let address = line.rsplit(' ').next().unwrap_or_default();
    let (before, time) = (ask(&here, "status")?, Duration::from_secs(1));
    thread::sleep(time);
    let reached = number(&ask(&here, "status")?, "batches")? - number(&before, "batches")?;
    tell(&format!(
        "it has rewritten {} MB in a second; it migrates to {address}",
        (reached << 20) / 1_000_000
    ));

    let wish = if args.local { format!("hand-over {address}") } else { args.how.wish(address) };
    let report = ask(&here, &wish)?;
    let arrived = ask(&there, "status")?;
    thread::sleep(time);
    let later = ask(&there, "status")?;
    let verified = ask(&there, "verify")?;

    let of = |name| number(&report, name);
    let downtime = of("downtime_ms")?;
    let stood = (number(&arrived, "ran_at")?.saturating_sub(of("stopped_at")?)) / 1_000_000;
    let (left_at, now_at) = (of("batches")?, number(&later, "batches")?);
    let wrong = number(&verified, "wrong")?;
    if args.local {
        tell(&format!("handed over in {} ms, with {} bytes sent", of("total_ms")?, of("transferred")?));
    } else {
        tell(&format!(
            "migrated over {} channels in {} passes and {} ms: {} MiB, {} pages, {} zero pages, {} Mbit/s in the last",
            args.how.channels,
            of("passes")?,
            of("total_ms")?,
            of("transferred")? >> 20,
            of("pages")?,
            of("zero")?,
            of("mbps")?,
        ));
    }
    if let Ok(lost) = value::<String>(&report, "lost_channels") {
        tell(&format!("without the channels whose connections broke: {lost}"));
    }
    if number(&report, "switched").is_ok() {
        tell(&follow(&report, &mut destination)?);
    }
    tell(&format!(
        "downtime {downtime} ms (limit {} ms); the guest was stopped for {stood} ms",
        args.how.downtime_limit
    ));
    tell(&format!("it counted to {left_at} at the source and continues there: {now_at}, without a gap"));
    tell(&format!("{wrong} wrong bytes of {}", number(&verified, "of")?));
    let held = [
        (wrong == 0, "bytes are wrong"),
        (now_at > left_at, "the guest does not run at the destination"),
        (downtime <= u128::from(args.how.downtime_limit), "the downtime is above its limit"),
    ];
    held.iter().find(|(held, _)| !held).map_or(Ok(()), |(_, broken)| Err((*broken).into()))
}

/// What has happened after a switch to post-copy.
fn follow(report: &str, destination: &mut Process) -> Result<String, Failure> {
    let line = loop {
        let line = destination.line()?;
        if line.starts_with("memory is missing") {
            return Err(line.into());
        }
        if line.starts_with("all memory is there") {
            break line;
        }
    };
    let of = |name| number(report, name);
    let there = |name| number(&line, name);
    Ok(format!(
        "it switched to post-copy: {} pages followed in {} ms over {}, {} of them requested; \
         the guest waited {} times, half of them for at most {} us, 99 % for at most {} us, {} ms in all",
        of("later_pages")?,
        of("later_ms")?,
        if of("over_channels")? == 1 { "the channels" } else { "main" },
        of("requests")?,
        there("faults")?,
        there("p50_us")?,
        there("p99_us")?,
        there("blocked_us")? / 1000,
    ))
}

/// Captures a busy machine, runs a second one out of the file, and checks both.
fn twins(args: &DemoArgs, folder: &std::path::Path) -> Result<(), Failure> {
    let (first, second, file) = (folder.join("first"), folder.join("second"), folder.join("machine.ram"));
    let text = |path: &std::path::Path| path.display().to_string();
    let (size, rate) = (args.guest.size.to_string(), args.guest.rate.to_string());
    tell(&format!(
        "a guest of {} MiB begins to rewrite {} MB/s",
        args.guest.size >> 20,
        args.guest.rate / 1_000_000
    ));
    let start = ["run", "--control", &text(&first), "--size", &size, "--rate", &rate];
    let (_first, _) = Process::start(&start)?;
    let time = Duration::from_secs(1);
    thread::sleep(time);
    let report = ask(&first, &format!("snapshot-moment {}", file.display()))?;
    let (_second, _) = Process::start(&["restore", "--lazy", "--control", &text(&second), &text(&file)])?;
    let begun = [ask(&first, "status")?, ask(&second, "status")?];
    thread::sleep(time);
    let later = [ask(&first, "status")?, ask(&second, "status")?];
    let verified = [ask(&first, "verify")?, ask(&second, "verify")?];

    let of = |name| number(&report, name);
    tell(&format!(
        "captured at one moment: {} pages; the guest was stopped for {} us, of which {} us to protect {} pages again",
        of("pages")?,
        of("pause_us")?,
        of("hold_us")?,
        of("held")?,
    ));
    tell(&format!(
        "while it was copied, the guest waited for {} pages, 99 % of them for less than {} us",
        of("faults")?,
        of("p99_us")?
    ));
    for (name, ((begun, later), verified)) in
        ["captured", "second"].iter().zip(begun.iter().zip(&later).zip(&verified))
    {
        let (before, now) = (number(begun, "batches")?, number(later, "batches")?);
        let (wrong, all) = (number(verified, "wrong")?, number(verified, "of")?);
        tell(&format!("the {name} machine counted from {before} to {now}; {wrong} wrong bytes of {all}"));
        if wrong > 0 || now <= before {
            return Err(format!("the {name} machine does not run as it should").into());
        }
    }
    Ok(())
}
