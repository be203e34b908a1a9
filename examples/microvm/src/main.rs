//! A virtual machine monitor of a few hundred lines whose machine migrates live: how an embedder uses `multifd`.
//!
//! | file | what it shows |
//! | --- | --- |
//! | `source.rs` | memory, dirty logs, channels, migration |
//! | `destination.rs` | receiving a machine |
//! | `early.rs` | post-copy: a guest that runs before its memory is there |
//! | `local.rs` | handing a machine over to another process of the host |
//! | `machine.rs` | stopping a vCPU with complete state, and returning it as device sections |
//! | `guest.rs`, `guest.s` | a guest that detects errors |
//! | `snapshot.rs` | a machine in a file, and a guest that runs before its memory is there |
//! | `control.rs`, `demo.rs` | the rest of a monitor |

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the guest's program is for x86-64");

mod control;
mod demo;
mod destination;
mod early;
mod guest;
mod local;
mod machine;
mod memory;
mod snapshot;
mod source;

use std::{io::Write, os::unix::net::UnixListener, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use multifd::{
    channel::{Address, Listener, Stop, hand_over::HandOverListener},
    live::PostcopyWhen,
};
use qemu_stream::{arrival::ArrivalOptions, incoming::Expected};

use crate::machine::Machine;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A small virtual machine that migrates live over many channels.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a machine and run it until it has migrated, or gets the command to quit
    Run {
        #[command(flatten)]
        control: Control,
        #[command(flatten)]
        guest: GuestArgs,
    },
    /// Wait for a machine that migrates here, and run it
    Incoming {
        #[command(flatten)]
        control: Control,
        /// Take the memory over from a process of this host, without a copy: with a unix socket
        #[arg(long)]
        local: bool,
        /// Run the guest before its memory is there, if its source switches to post-copy
        #[arg(long, conflicts_with = "local")]
        postcopy: bool,
        /// Continue without a channel whose connection breaks before the guest moves, if the source has this on, too
        #[arg(long, conflicts_with = "local")]
        channels_may_break: bool,
        /// Where to listen: tcp:HOST:PORT, unix:PATH
        address: Address,
    },
    /// Make a running machine migrate; an interrupt cancels it
    Migrate {
        #[command(flatten)]
        control: Control,
        #[command(flatten)]
        how: How,
        /// Hand the memory over to a process of this host, without a copy: it was started with --shared, and the other one with
        /// --local
        #[arg(long)]
        local: bool,
        /// Where `microvm incoming` listens
        address: Address,
    },
    /// Capture a running machine to a file; its guest continues
    Snapshot {
        #[command(flatten)]
        control: Control,
        /// Capture it as it is at one moment: the guest is stopped only while its devices are saved
        #[arg(long)]
        moment: bool,
        /// Store only what differs from the machine in this file, which is needed to restore it
        #[arg(long, value_name = "FILE", conflicts_with = "moment")]
        base: Option<PathBuf>,
        /// The file
        file: PathBuf,
    },
    /// Run a machine out of a file, and of the files that it is based on
    Restore {
        #[command(flatten)]
        control: Control,
        /// Run the guest at once, before its memory is there
        #[arg(long)]
        lazy: bool,
        /// The file
        file: PathBuf,
    },
    /// Send a command to a running machine: status, verify, quit
    Ask {
        #[command(flatten)]
        control: Control,
        /// What
        question: String,
    },
    /// Move a busy machine to a second process, or run a second one out of its capture, and check it there
    Demo(DemoArgs),
}

#[derive(clap::Args)]
struct Control {
    /// The machine's control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
}

#[derive(clap::Args)]
struct GuestArgs {
    /// Bytes of memory
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    size: u64,
    /// Bytes per second that the guest rewrites, page by page
    #[arg(long, default_value = "200MB", value_parser = bytes)]
    rate: u64,
    /// Memory that can be handed over to another process
    #[arg(long)]
    shared: bool,
}

#[derive(clap::Args)]
struct DemoArgs {
    /// Capture the machine as it is at one moment, run a second one out of the file before its memory is there, and check both
    #[arg(long, conflicts_with = "local")]
    snapshot: bool,
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    how: How,
    /// Hand the memory over instead of copying it
    #[arg(long)]
    local: bool,
}

#[derive(clap::Args)]
struct How {
    /// Connections for memory, in addition to the main one
    #[arg(long, default_value_t = 4)]
    channels: u8,
    /// Milliseconds for which the guest may be stopped
    #[arg(long, default_value_t = 300)]
    downtime_limit: u64,
    /// Bytes per second; 0 is no limit
    #[arg(long, default_value_t = 0, value_parser = bytes)]
    max_bandwidth: u64,
    /// Throttle the guest if it writes too fast to be stopped within the downtime
    #[arg(long)]
    auto_converge: bool,
    /// Move the guest before its memory, when no end can be predicted, or at another time: request, start, stall, passes:N, after:SECONDS.
    /// The destination was started with --postcopy
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "stall")]
    postcopy: Option<PostcopyWhen>,
    /// Fail if the guest cannot be stopped after this number of passes; 0 is no limit
    #[arg(long, default_value_t = 0, value_name = "PASSES")]
    max_passes: u64,
    /// Continue without a channel whose connection breaks before the guest moves. The destination was started with
    /// --channels-may-break, too
    #[arg(long)]
    channels_may_break: bool,
    /// Milliseconds for which the destination may read nothing
    #[arg(long, default_value_t = 120_000)]
    stall_timeout: u64,
}

impl How {
    /// The command for the control socket.
    fn wish(&self, address: &str) -> String {
        let Self {
            channels,
            downtime_limit,
            max_bandwidth,
            auto_converge,
            postcopy,
            max_passes,
            channels_may_break,
            stall_timeout,
        } = self;
        let postcopy = postcopy.unwrap_or_default();
        format!(
            "migrate {address} channels={channels} downtime_ms={downtime_limit} bandwidth={max_bandwidth} \
             auto_converge={auto_converge} postcopy={postcopy} max_passes={max_passes} \
             channels_may_break={channels_may_break} stall_ms={stall_timeout}"
        )
    }
}

fn main() -> ExitCode {
    match run(Args::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "microvm: {}", control::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Run { control, guest } => {
            let control = Socket::bind(control.control)?;
            let memory = match guest.shared {
                true => memory::shared(guest.size)?,
                false => memory::new(guest.size)?,
            };
            let machine = Machine::boot(memory, guest.size, guest.rate)?;
            machine.run();
            control.serve(&machine)
        }
        Verb::Incoming { control, local: true, address, .. } => {
            let control = Socket::bind(control.control)?;
            let (listener, handed) = HandOverListener::bind(&address)?;
            tell(&format!("listening at {address}"));
            let options = ArrivalOptions::new(Expected::Type(Machine::machine_type()?));
            let machine = local::take_over(listener, &handed, options, &Stop::new())?;
            control.serve(&machine)
        }
        Verb::Incoming { control, postcopy, channels_may_break, address, .. } => {
            let control = Socket::bind(control.control)?;
            let listener = Listener::bind(&address)?;
            tell(&format!("listening at {}", listener.local_address()));
            let options = ArrivalOptions::new(Expected::Type(Machine::machine_type()?));
            let options = options.channels_may_break(channels_may_break);
            if postcopy {
                let arrived = early::receive(listener, options, &Stop::new())?;
                return arrived.serve(|machine| control.serve(machine));
            }
            let machine = destination::receive(listener, options, &Stop::new())?;
            control.serve(&machine)
        }
        Verb::Migrate { control, how, local, address } => {
            let wish = if local { format!("hand-over {address}") } else { how.wish(&address.to_string()) };
            tell(&control::ask(&control.control, &wish)?);
            Ok(())
        }
        Verb::Snapshot { control, moment, base, file } => {
            let file = std::path::absolute(file)?;
            let request = match base {
                Some(base) => {
                    format!("snapshot-since {}\t{}", std::path::absolute(base)?.display(), file.display())
                }
                None if moment => format!("snapshot-moment {}", file.display()),
                None => format!("snapshot {}", file.display()),
            };
            tell(&control::ask(&control.control, &request)?);
            Ok(())
        }
        Verb::Restore { control, lazy, file } => {
            let control = Socket::bind(control.control)?;
            let restored = snapshot::restore(&file, lazy)?;
            restored.serve(|machine| control.serve(machine))
        }
        Verb::Ask { control, question } => {
            tell(&control::ask(&control.control, &question)?);
            Ok(())
        }
        Verb::Demo(args) => demo::run(&args),
    }
}

/// The control socket, which is removed with its machine.
struct Socket(UnixListener, PathBuf);

impl Socket {
    fn bind(path: PathBuf) -> Result<Self, Failure> {
        let listener = UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(listener, path))
    }

    fn serve(&self, machine: &Machine) -> Result<(), Failure> {
        tell(&format!("running, ask at {}", self.1.display()));
        control::serve(machine, &self.0)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.1);
    }
}

fn bytes(text: &str) -> Result<u64, parse_size::Error> {
    parse_size::parse_size(text)
}

/// A line on standard output.
fn tell(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
