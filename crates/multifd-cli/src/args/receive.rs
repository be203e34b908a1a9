//! The command line of `multifd receive`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args as ClapArgs, ValueEnum};
use multifd::{
    ChannelCount, ChannelsFrom, Method,
    error::Usage,
    parameters::{DECOMPRESSION_MEMORY, STALL_TIMEOUT},
};

use super::{
    many::ManyArgs,
    run::RunArgs,
    shared::{OutputArgs, default_seconds, label, limit, number, plain_file_address, seconds, size},
};
use crate::{file_address::FileAddress, listen_address::ListenAddress};

#[derive(Debug, ClapArgs)]
pub(crate) struct ReceiveArgs {
    /// Number of channels that the source opens, 0 to 255; auto = detected
    #[arg(long, alias = "channels", value_name = "N|auto", default_value = "auto", value_parser = channel_count)]
    pub(crate) multifd_channels: ChannelCount,
    /// Hosts that channels may connect from: main (the host of the main connection), any, or a comma-separated list
    /// of IP addresses. Other connections are dropped with a warning
    #[arg(long, value_name = "main|any|ADDR[,ADDR...]", default_value = "main", value_parser = ChannelsFrom::from_str)]
    pub(crate) channels_from: ChannelsFrom,
    /// Compression method that the source must use: none, zlib or zstd; auto: the method that the packets name
    #[arg(long, value_name = "METHOD|auto", default_value = "auto", value_parser = method_or_auto)]
    pub(crate) multifd_compression: MethodChoice,
    /// Memory in bytes that the decompression of all channels may use for zstd windows, for example 512M or 1G; 0 = no
    /// limit
    #[arg(long, value_name = "SIZE", default_value_t = DECOMPRESSION_MEMORY.default, value_parser = size)]
    decompression_memory: u64,
    /// Continue without a channel whose connection breaks, over the others, if the source is multifd send with this flag
    #[arg(long)]
    pub(crate) channels_may_break: bool,
    #[command(flatten)]
    pub(crate) tls: ReceiveTlsArgs,
    /// Send SWITCHOVER_ACK; required if the source has capability switchover-ack on
    #[arg(long)]
    pub(crate) switchover_ack: bool,
    /// Expect no device description (source with suppress-vmdesc=on; default for machine types up to 2.2)
    #[arg(long)]
    pub(crate) suppress_vmdesc: bool,
    /// Action if a page of RAM never arrived. WARNING: zero loses guest memory if the page was lost in transit
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) missing_pages: MissingPagesArg,
    /// Time limit for a source to connect, in seconds or with a unit (500ms, 2m, 1.5h); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = seconds)]
    accept_timeout: Duration,
    /// Fail after this number of refused connections (TLS handshakes that fail, connections that are no migration) while no
    /// source has connected; 0 = no limit. WARNING: with a limit, any host that can connect can end the wait
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = number::<u64>(0, u64::MAX))]
    pub(crate) max_refused: u64,
    /// Time limit for a source that sends nothing while data is expected, in seconds or with a unit (500ms, 2m); 0 = no
    /// limit
    #[arg(long, value_name = "TIME", default_value = default_seconds(STALL_TIMEOUT), value_parser = seconds)]
    stall_timeout: Duration,
    /// Time limit for a source that is silent between two sections of RAM, as with capability pause-before-switchover, in
    /// seconds or with a unit (500ms, 2m); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = "3600", value_parser = seconds)]
    pause_timeout: Duration,
    /// Write pages from channels with direct I/O, past the page cache, if the file system supports it
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Replace FILE if it exists; with an offset, replace the data after the offset. WARNING: the old data is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Write a delta: only the pages that differ from those in BASE, which is a whole file or a delta: a path, or
    /// file:PATH,offset=N. FILE then needs BASE, unchanged, at the same place as seen from FILE
    #[arg(long, value_name = "BASE", value_parser = plain_file_address())]
    pub(crate) base: Option<FileAddress>,
    /// Text to store in FILE, shown by multifd inspect
    #[arg(long, value_name = "TEXT", value_parser = label)]
    pub(crate) label: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) many: ManyArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Address to listen at: tcp:HOST:PORT[,ipv4=on|off][,ipv6=on|off][,keep-alive=on|off][,user-timeout=SECONDS],
    /// unix:PATH, vsock:CID:PORT, fd:N, exec:COMMAND (reads from the output of the command, without channels), - (reads
    /// from standard input, without channels), or systemd (the sockets that a socket unit passes). Port 0 = a free port
    #[arg(value_parser = ListenAddress::parse)]
    pub(crate) listen: ListenAddress,
    /// File to write: a path, or file:PATH,offset=N to keep the first N bytes and write after them
    #[arg(value_parser = plain_file_address(), required_unless_present = "dir")]
    pub(crate) file: Option<FileAddress>,
}

impl ReceiveArgs {
    /// Bytes; `None` is no limit.
    pub(crate) fn decompression_memory(&self) -> Option<u64> {
        Some(self.decompression_memory).filter(|bytes| *bytes > 0)
    }

    /// A flag that was given and that concerns a single machine.
    pub(crate) fn of_one_run(&self) -> Option<&'static str> {
        let given = [
            ("--timeout", self.run.timeout().is_some()),
            ("--metrics", self.run.metrics.is_some()),
            ("--control", self.run.control.is_some()),
            ("--accept-timeout", self.accept_timeout().is_some()),
            ("--max-refused", self.max_refused > 0),
            ("--base", self.base.is_some()),
        ];
        given.into_iter().find_map(|(flag, is_given)| is_given.then_some(flag))
    }

    /// `None` is no limit.
    pub(crate) fn accept_timeout(&self) -> Option<Duration> {
        limit(self.accept_timeout)
    }

    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        limit(self.stall_timeout)
    }

    /// `None` is no limit.
    pub(crate) fn pause_timeout(&self) -> Option<Duration> {
        limit(self.pause_timeout)
    }
}

/// TLS options of a destination.
#[derive(Debug, ClapArgs)]
pub(crate) struct ReceiveTlsArgs {
    /// Use TLS, with the certificates in DIR: ca-cert.pem, server-cert.pem, server-key.pem
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// Accept only sources with this certificate subject, for example O=Example,CN=source; can be repeated. Without
    /// it, all sources with a certificate of the CA are accepted
    #[arg(long, value_name = "SUBJECT", requires = "tls_creds")]
    pub(crate) tls_authz: Vec<String>,
}

/// A method; `None` is the one that the packets name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MethodChoice(pub(crate) Option<Method>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MissingPagesArg {
    /// Fail
    #[default]
    Refuse,
    /// Store it as zeros
    Zero,
}

fn channel_count(text: &str) -> Result<ChannelCount, String> {
    if text == "auto" {
        return Ok(ChannelCount::Auto);
    }
    u8::from_str(text).map(ChannelCount::Exact).map_err(|_| "expected 0 to 255, or auto".into())
}

fn method_or_auto(text: &str) -> Result<MethodChoice, String> {
    if text == "auto" {
        return Ok(MethodChoice(None));
    }
    text.parse()
        .map(|method| MethodChoice(Some(method)))
        .map_err(|error: Usage| error.to_string() + ", or auto")
}
