//! The command line.

use std::{ffi::OsString, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use clap::{
    Args as ClapArgs, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use multifd::{
    ChannelCount, ChannelsFrom, Method, SendOptions,
    channel::{
        Address, Connect, Listen, Listener,
        tls::{ClientCredentials, ServerCredentials, TlsConnector, TlsListener},
    },
    error::Usage,
    live::ZeroPageDetection,
    parameters::DOWNTIME_LIMIT,
    wire::VmUuid,
};
use parse_size::Config;

use crate::{
    demo::ConvergeArgs,
    file_address::{FileAddress, file_path},
    outcome::While,
};

/// Live migration of virtual machines over many connections, in QEMU's format
///
/// Set the environment variable MULTIFD_LOG to debug or trace to log the events of every channel.
#[derive(Debug, Parser)]
#[command(name = "multifd", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Receive a running QEMU guest and keep it in a file
    ///
    /// Accepts one migration, writes the guest to FILE, and exits. FILE is a mapped-ram file. Restore it with
    /// `multifd send`, or load it with QEMU 9.0 or later (capability mapped-ram).
    ///
    /// FILE appears when it is complete and on the disk. It holds the guest's memory, so only its owner can read it.
    ///
    /// WARNING: Exit code 3 means that FILE is complete, but the source did not get the confirmation and may still
    /// run the guest. Check the source before you restore FILE: the guest must not run twice.
    Receive(ReceiveArgs),
    /// Send a guest from a file to a waiting QEMU
    ///
    /// FILE was written by `multifd receive`, or by QEMU 9.0 or later with capability mapped-ram. It is not changed.
    Send(SendArgs),
    /// Show the machine type, RAM blocks and devices in a file, or extract the RAM of a block
    Inspect(InspectArgs),
    /// Migrate a busy guest to a second process on this machine and compare both memories
    ///
    /// Needs no QEMU: the guest is memory and two threads that write to it all the time.
    Demo(DemoArgs),
    #[command(hide = true)]
    DemoDestination(DemoDestinationArgs),
}

impl Verb {
    /// Whether only errors are printed.
    pub(crate) fn quiet(&self) -> bool {
        match self {
            Self::Receive(args) => args.output.quiet,
            Self::Send(args) => args.output.quiet,
            Self::Inspect(_) | Self::Demo(_) | Self::DemoDestination(_) => false,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ReceiveArgs {
    /// Number of channels that the source opens, 0 to 255; auto = detected
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = channel_count)]
    pub(crate) multifd_channels: ChannelCount,
    /// Hosts that channels may connect from: main (the host of the main connection), any, or a comma-separated list
    /// of IP addresses. Other connections are dropped with a warning
    #[arg(long, value_name = "main|any|ADDR[,ADDR...]", default_value = "main", value_parser = ChannelsFrom::from_str)]
    pub(crate) channels_from: ChannelsFrom,
    /// Compression method that the source must use: none, zlib or zstd; auto: the method that the packets name
    #[arg(long, value_name = "METHOD|auto", default_value = "auto", value_parser = method_or_auto)]
    pub(crate) multifd_compression: MethodChoice,
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
    /// Time limit in seconds for a source that sends nothing while data is expected; 0 = no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    stall_timeout: u64,
    /// Write pages from channels with direct I/O, past the page cache, if the file system supports it
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Replace FILE if it exists; with an offset, replace the data after the offset. WARNING: the old data is lost
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Address to listen at: tcp:HOST:PORT[,ipv4=on|off][,ipv6=on|off][,keep-alive=on|off][,user-timeout=SECONDS],
    /// unix:PATH, vsock:CID:PORT, fd:N, or exec:COMMAND (reads from the output of the command, without channels).
    /// Port 0 = a free port
    pub(crate) listen: Address,
    /// File to write: a path, or file:PATH,offset=N to keep the first N bytes and write after them
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
}

impl ReceiveArgs {
    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        seconds(self.stall_timeout)
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct SendArgs {
    /// Number of channels; must equal the multifd-channels of the destination; 0 = the destination has multifd off
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Limit in bytes per second over all connections, for example 100M; 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) max_bandwidth: u64,
    /// How zero pages are sent
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) zero_page_detection: ZeroPagesArg,
    /// Whether to wait until the destination confirms that it has the guest
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) return_path: ReturnPathArg,
    /// How the end of a pass is marked in the stream
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) sync_mode: SyncModeArg,
    /// Connect timeout in seconds, TLS handshake included; 0 = system default
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    connect_timeout: u64,
    /// Time limit in seconds for a destination that accepts no data; 0 = no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    stall_timeout: u64,
    /// Time limit in seconds for the final confirmation of the destination; 0 = no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    end_timeout: u64,
    #[command(flatten)]
    pub(crate) tls: SendTlsArgs,
    /// UUID of the machine; must equal the UUID of the destination (default: the UUID in FILE)
    #[arg(long)]
    pub(crate) uuid: Option<VmUuid>,
    /// Read pages for channels with direct I/O, past the page cache, if the file system supports it
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Send pages without copying them; plain TCP only; needs 4 MiB of locked memory per channel
    #[arg(long)]
    pub(crate) zero_copy_send: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// File to send: a path, or file:PATH,offset=N
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// Address of the destination: tcp:HOST:PORT[,OPTION...] as for receive, unix:PATH, vsock:CID:PORT, fd:N, or
    /// exec:COMMAND (writes to the input of the command, without channels)
    pub(crate) address: Address,
}

impl SendArgs {
    pub(crate) fn connect_timeout(&self) -> Duration {
        seconds(self.connect_timeout).unwrap_or(Duration::MAX)
    }

    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        seconds(self.stall_timeout)
    }

    /// `None` is no limit.
    pub(crate) fn end_timeout(&self) -> Option<Duration> {
        seconds(self.end_timeout)
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct InspectArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the RAM of this block to OUT, as raw bytes; zero pages become holes
    #[arg(long, value_name = "BLOCK", requires = "out", conflicts_with = "json")]
    pub(crate) extract: Option<OsString>,
    /// Replace OUT if it exists. WARNING: the old data is lost
    #[arg(long, requires = "extract")]
    pub(crate) force: bool,
    /// File to read: a path, or file:PATH,offset=N
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// File for the RAM of BLOCK, readable by its owner only; - = standard output
    #[arg(requires = "extract", value_parser = out_path())]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoArgs {
    /// Size of the guest's memory in bytes, for example 512M or 4G
    #[arg(long, default_value = "1G", value_parser = size)]
    pub(crate) size: u64,
    /// Number of channels, 1 to 255
    #[arg(long, alias = "channels", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// How zero pages are found and sent
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) zero_page_detection: ZeroPagesArg,
    /// Limit in bytes per second over all connections while the guest runs, for example 100M; 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) max_bandwidth: u64,
    /// Assumed bandwidth in bytes per second after the guest is stopped; 0 = as measured
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) avail_switchover_bandwidth: u64,
    /// Longest planned downtime of the guest in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=DOWNTIME_LIMIT.most))]
    pub(crate) downtime_limit: u64,
    #[command(flatten)]
    pub(crate) converge: ConvergeArgs,
    /// Rate in bytes per second at which the guest writes to its memory
    #[arg(long, value_name = "RATE", default_value = "200M", value_parser = size)]
    pub(crate) dirty_rate: u64,
    /// Send pages without copying them; on one machine the kernel copies anyway
    #[arg(long)]
    pub(crate) zero_copy_send: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoDestinationArgs {
    pub(crate) listen: Address,
}

/// How a source packs pages.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct CompressionArgs {
    /// Compression method: none, zlib or zstd; must equal the multifd-compression of the destination
    #[arg(long, value_name = "METHOD", default_value = "none", value_parser = Method::from_str)]
    multifd_compression: Method,
    /// zlib level, 0 (stored) to 9 (smallest)
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=9))]
    multifd_zlib_level: u8,
    /// zstd level, 1 (fastest) to 20 (smallest); 0 = zstd's own default
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=20))]
    multifd_zstd_level: u8,
}

impl CompressionArgs {
    /// Whether pages are packed at all.
    pub(crate) fn packs(self) -> bool {
        self.multifd_compression != Method::None
    }

    pub(crate) fn apply(self, options: SendOptions) -> SendOptions {
        options
            .method(self.multifd_compression)
            .zlib_level(self.multifd_zlib_level)
            .zstd_level(self.multifd_zstd_level)
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

/// TLS options of a source.
#[derive(Debug, ClapArgs)]
pub(crate) struct SendTlsArgs {
    /// Use TLS, with the certificates in DIR: ca-cert.pem, client-cert.pem, client-key.pem
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,
    /// Name that the certificate of the destination must contain; without it, the host in ADDRESS
    #[arg(long, value_name = "NAME", requires = "tls_creds")]
    tls_hostname: Option<String>,
}

impl SendTlsArgs {
    /// The name that the certificate at `address` must hold; not used without TLS.
    ///
    /// # Errors
    /// [`Usage::NoTlsHostname`].
    pub(crate) fn hostname<'a>(&'a self, address: &'a Address) -> Result<&'a str, Usage> {
        match (&self.tls_creds, &self.tls_hostname, address) {
            (None, ..) => Ok(""),
            (_, Some(name), _) => Ok(name),
            (_, None, Address::Tcp { host, .. }) if !host.is_empty() => Ok(host),
            _ => Err(Usage::NoTlsHostname(address.to_string())),
        }
    }

    /// Whether connections are encrypted.
    pub(crate) fn encrypts(&self) -> bool {
        self.tls_creds.is_some()
    }

    /// What opens connections to `address`.
    pub(crate) fn connector(&self, address: &Address) -> Result<Arc<dyn Connect>, While> {
        let plain = Arc::new(address.clone());
        let Some(folder) = &self.tls_creds else { return Ok(plain) };
        let name = self.hostname(address).map_err(|error| While::new("cannot set TLS up", error))?;
        let credentials = ClientCredentials::load(folder, name);
        let credentials = credentials.map_err(|error| While::new("cannot set TLS up", error))?;
        Ok(Arc::new(TlsConnector::new(plain, credentials)))
    }
}

impl ReceiveTlsArgs {
    /// The certificates of this side, and its rules for peers; `None` without TLS.
    pub(crate) fn credentials(&self) -> Result<Option<ServerCredentials>, While> {
        let Some(folder) = &self.tls_creds else { return Ok(None) };
        let credentials = ServerCredentials::load(folder, self.tls_authz.clone());
        credentials.map(Some).map_err(|error| While::new("cannot set TLS up", error))
    }

    /// What takes connections from `listener`.
    pub(crate) fn listener(credentials: Option<ServerCredentials>, listener: Listener) -> Box<dyn Listen> {
        match credentials {
            Some(credentials) => Box::new(TlsListener::new(Box::new(listener), credentials)),
            None => Box::new(listener),
        }
    }
}

/// A method; `None` is the one that the packets name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MethodChoice(pub(crate) Option<Method>);

#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct OutputArgs {
    /// Print one JSON object at the end, with the fields of QEMU's query-migrate
    #[arg(long)]
    pub(crate) json: bool,
    /// Print errors only; receive also prints its address
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MissingPagesArg {
    /// Fail
    #[default]
    Refuse,
    /// Store it as zeros
    Zero,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReturnPathArg {
    /// On, except over exec
    #[default]
    Auto,
    /// Wait for the confirmation
    On,
    /// Success after the last byte; over exec, after exit status 0
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SyncModeArg {
    /// Chosen by the machine type
    #[default]
    Auto,
    /// A sync with every section: machine types up to 8.0
    Legacy,
    /// A sync with every round: machine types 8.1 and later
    Round,
}

/// `zero-page-detection`, or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZeroPagesArg {
    /// send: chosen by the machine type; demo: multifd
    #[default]
    Auto,
    /// Like other pages
    None,
    /// On the main connection; works with every destination
    Legacy,
    /// In the packets of the channels; needs QEMU 9.0 or later
    Multifd,
}

impl ZeroPagesArg {
    /// The mode; `auto` is for a caller who leaves it to the destination.
    pub(crate) fn or(self, auto: ZeroPageDetection) -> ZeroPageDetection {
        match self {
            Self::Auto => auto,
            Self::None => ZeroPageDetection::None,
            Self::Legacy => ZeroPageDetection::Legacy,
            Self::Multifd => ZeroPageDetection::Multifd,
        }
    }
}

/// A limit; 0 is none.
fn seconds(limit: u64) -> Option<Duration> {
    (limit > 0).then(|| Duration::from_secs(limit))
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

/// A path, or QEMU's form of it.
fn file_address() -> impl TypedValueParser<Value = FileAddress> {
    OsStringValueParser::new().try_map(FileAddress::parse)
}

/// The path of a file that is to be written; `-` is one, too.
fn out_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(file_path)
}

/// Bytes, with binary units as QEMU has them: 1K is 1024.
fn size(text: &str) -> Result<u64, String> {
    let parsed = Config::new().with_binary().parse_size(text.trim_end_matches("/s"));
    parsed.map_err(|error| format!("expected a size in bytes like 4096, 100M or 2G: {error}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_are_binary_and_nonsense_is_refused() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("100M/s"), Ok(100 << 20));
        assert!(size("lots").is_err() && size("-1").is_err() && size("99999999E").is_err());
    }
}
