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

/// Moves running virtual machines over many channels, in QEMU's own wire format.
///
/// Set MULTIFD_LOG to debug or trace to see what happens on every channel.
#[derive(Debug, Parser)]
#[command(name = "multifd", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Take a running QEMU guest in and keep it as a file
    ///
    /// Waits for one migration, stores it, and ends. The file is a mapped-ram file: send it on with `multifd
    /// send`, or let QEMU 9.0 and later load it itself with capability mapped-ram and `-incoming file:FILE`.
    ///
    /// The file appears under its name only when it is complete and on the disk. It is readable by its owner
    /// alone, for it holds the guest's memory. In a container, `file:PATH,offset=N`, the first N bytes are kept.
    ///
    /// Exit code 3: the guest is kept whole, but its source was not told, and may run it on. Look there before the file
    /// is restored.
    Receive(ReceiveArgs),
    /// Send a file that holds a guest into a waiting QEMU
    ///
    /// Takes files written by `multifd receive`, and by QEMU 9.0 and later with capability mapped-ram.
    Send(SendArgs),
    /// Show what a file holds: machine, RAM blocks, devices; or take the RAM of a block out
    Inspect(InspectArgs),
    /// Migrate a busy guest between two processes of this machine, and prove that nothing was lost
    ///
    /// Needs no QEMU: the guest is memory and threads that keep writing to it.
    Demo(DemoArgs),
    #[command(hide = true)]
    DemoDestination(DemoDestinationArgs),
}

impl Verb {
    /// Whether nothing but errors is to be said.
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
    /// Number of channels that the source opens, 0 to 255, or auto to learn it from the source
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = channel_count)]
    pub(crate) multifd_channels: ChannelCount,
    /// Where channels may come from: main (the host of the main connection), any, or IP addresses with commas between them.
    /// Connections from elsewhere are dropped with a warning
    #[arg(long, value_name = "main|any|ADDR[,ADDR...]", default_value = "main", value_parser = ChannelsFrom::from_str)]
    pub(crate) channels_from: ChannelsFrom,
    /// Method that the source must use: none, zlib or zstd, or auto to take the one that its packets name
    #[arg(long, value_name = "METHOD|auto", default_value = "auto", value_parser = method_or_auto)]
    pub(crate) multifd_compression: MethodChoice,
    #[command(flatten)]
    pub(crate) tls: ReceiveTlsArgs,
    /// Say SWITCHOVER_ACK: for a source with capability switchover-ack on, which waits for it
    #[arg(long)]
    pub(crate) switchover_ack: bool,
    /// Take it that the source does not describe its devices: its machine has suppress-vmdesc on, as types up to 2.2
    ///
    /// Their end is then where the source closes, which one with return-path does not: there 10 seconds of silence
    /// behind the footer of a device count, and machine types without footers are refused.
    #[arg(long)]
    pub(crate) suppress_vmdesc: bool,
    /// What to do where a page of RAM never came, not even as zero: refuse, or keep it as zero. A guest whose balloon gives
    /// free-page hints leaves out what it does not use
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) missing_pages: MissingPagesArg,
    /// Seconds that the source may send nothing at all where something is due; 0 is for ever. Between passes it may be
    /// silent for as long as it likes
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    stall_timeout: u64,
    /// Write pages from channels past the page cache, where the file system can
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Replace FILE if it exists; with an offset, what stands behind the offset
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Where to listen: tcp:HOST:PORT[,ipv4=on|off][,ipv6=on|off][,keep-alive=on|off][,user-timeout=SECONDS] (port 0
    /// takes a free one), unix:PATH, vsock:CID:PORT, fd:N, or exec:COMMAND, whose output comes from a source with multifd
    /// off
    pub(crate) listen: Address,
    /// The file to write: a path, or file:PATH,offset=N to keep its first N bytes and write behind them
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
}

impl ReceiveArgs {
    /// `None` is for ever.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        seconds(self.stall_timeout)
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct SendArgs {
    /// Number of channels, the destination's multifd-channels; 0 for a destination with multifd off
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Bytes a second over all connections, like 100M; 0 is no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) max_bandwidth: u64,
    /// How zero pages travel; auto: multifd where only a QEMU that understands it can have the file's machine type,
    /// else legacy
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) zero_page_detection: ZeroPagesArg,
    /// Wait for the destination's word that it has the guest; auto does, but not over exec
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) return_path: ReturnPathArg,
    /// How passes are marked on the wire; auto follows the machine type: legacy up to 8.0, round from 8.1 on
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) sync_mode: SyncModeArg,
    /// Seconds that each connection may take to come about, a TLS handshake included; 0 is for as long as the system tries
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    connect_timeout: u64,
    /// Seconds that the destination may take nothing in at all; 0 is for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    stall_timeout: u64,
    /// Seconds that the destination may take, when it has got everything, to say that it has the guest; 0 is for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    end_timeout: u64,
    #[command(flatten)]
    pub(crate) tls: SendTlsArgs,
    /// The machine's UUID, the destination's -uuid; taken from the file where it has one
    #[arg(long)]
    pub(crate) uuid: Option<VmUuid>,
    /// Read pages for channels past the page cache, where the file system can
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Have the network card read pages where they are; plain tcp only, and 4 MiB of locked memory a channel
    #[arg(long)]
    pub(crate) zero_copy_send: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// The file to send: a path, or file:PATH,offset=N
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// Where the destination listens: tcp:HOST:PORT[,OPTION...] as for receive, unix:PATH, vsock:CID:PORT, fd:N, or
    /// exec:COMMAND, whose input goes to a destination with multifd off
    pub(crate) address: Address,
}

impl SendArgs {
    pub(crate) fn connect_timeout(&self) -> Duration {
        seconds(self.connect_timeout).unwrap_or(Duration::MAX)
    }

    /// `None` is for ever.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        seconds(self.stall_timeout)
    }

    /// `None` is for ever.
    pub(crate) fn end_timeout(&self) -> Option<Duration> {
        seconds(self.end_timeout)
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct InspectArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the RAM of this block into OUT, as raw bytes; pages that are zero become holes
    #[arg(long, value_name = "BLOCK", requires = "out", conflicts_with = "json")]
    pub(crate) extract: Option<OsString>,
    /// Replace OUT if it exists
    #[arg(long, requires = "extract")]
    pub(crate) force: bool,
    /// The file to look into: a path, or file:PATH,offset=N
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// Where the RAM of BLOCK goes: a new file, readable by its owner alone, or - for standard output
    #[arg(requires = "extract", value_parser = out_path())]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoArgs {
    /// The guest's memory, like 512M or 4G
    #[arg(long, default_value = "1G", value_parser = size)]
    pub(crate) size: u64,
    /// Number of channels
    #[arg(long, alias = "channels", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Where zero pages are looked for, and how they travel; auto is multifd
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) zero_page_detection: ZeroPagesArg,
    /// Bytes a second over all connections while the guest runs, like 100M; 0 is no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) max_bandwidth: u64,
    /// Bytes a second to reckon with once the guest has been stopped; 0 takes what was measured
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) avail_switchover_bandwidth: u64,
    /// Milliseconds that the guest may stand still
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=DOWNTIME_LIMIT.most))]
    pub(crate) downtime_limit: u64,
    #[command(flatten)]
    pub(crate) converge: ConvergeArgs,
    /// Bytes of memory that the guest writes a second
    #[arg(long, value_name = "RATE", default_value = "200M", value_parser = size)]
    pub(crate) dirty_rate: u64,
    /// Have the system read pages where they are; on one machine it copies them all the same
    #[arg(long)]
    pub(crate) zero_copy_send: bool,
    /// Print one JSON object at the end instead of text
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
    /// How pages are packed: none, zlib or zstd; the destination's multifd-compression
    #[arg(long, value_name = "METHOD", default_value = "none", value_parser = Method::from_str)]
    multifd_compression: Method,
    /// Level of zlib, 0 (stored) to 9 (smallest)
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=9))]
    multifd_zlib_level: u8,
    /// Level of zstd, 1 (fastest) to 20 (smallest); 0 is zstd's own default
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

/// Whom a destination trusts.
#[derive(Debug, ClapArgs)]
pub(crate) struct ReceiveTlsArgs {
    /// Take connections over TLS, with the certificates in DIR: ca-cert.pem, server-cert.pem, server-key.pem
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// Subject of a source that may come, like O=Example,CN=source; may be given often; without it, all that ca-cert.pem vouches for
    #[arg(long, value_name = "SUBJECT", requires = "tls_creds")]
    pub(crate) tls_authz: Vec<String>,
}

/// Whom a source trusts.
#[derive(Debug, ClapArgs)]
pub(crate) struct SendTlsArgs {
    /// Connect over TLS, with the certificates in DIR: ca-cert.pem, client-cert.pem, client-key.pem
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,
    /// Name that the destination's certificate must hold, if it is not ADDRESS's host
    #[arg(long, value_name = "NAME", requires = "tls_creds")]
    tls_hostname: Option<String>,
}

impl SendTlsArgs {
    /// The name that the certificate at `address` must hold; of no matter without TLS.
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
    /// What this side shows and whom it trusts; `None` without TLS.
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

/// A method, or whichever the packets name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MethodChoice(pub(crate) Option<Method>);

#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct OutputArgs {
    /// Print one JSON object at the end, with the fields of QEMU's query-migrate
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress, no warnings, no report in words: where it listens, and errors alone
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MissingPagesArg {
    /// The machine would not be whole
    #[default]
    Refuse,
    /// Pages that are lost on their way are kept as zero, too
    Zero,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReturnPathArg {
    /// On, but off over exec
    #[default]
    Auto,
    /// Wait for the destination's word
    On,
    /// Count the last byte as success; over exec, exit status 0
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SyncModeArg {
    /// As the machine type has it
    #[default]
    Auto,
    /// A sync with every section: machine types up to 8.0
    Legacy,
    /// A sync with every round: machine types from 8.1 on
    Round,
}

/// `zero-page-detection`, or what suits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZeroPagesArg {
    /// As is best for this destination
    #[default]
    Auto,
    /// They travel as any other page
    None,
    /// As records on main: every destination
    Legacy,
    /// As entries in the channels' packets: QEMU 9.0 and later
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
    parsed.map_err(|error| format!("expected bytes like 4096, 100M or 2G: {error}"))
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
