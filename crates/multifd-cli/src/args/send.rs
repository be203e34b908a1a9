//! The command line of `multifd send`.

use std::{path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, ValueEnum};
use multifd::{
    channel::Address,
    error::Usage,
    parameters::{CONNECT_TIMEOUT, MULTIFD_CHANNELS, STALL_TIMEOUT},
    wire::VmUuid,
};

use super::{
    compression::CompressionArgs,
    postcopy::PostcopyArgs,
    run::RunArgs,
    shared::{
        OutputArgs, ZeroPagesArg, default_seconds, destination_address, file_address, limit, number, rate,
        seconds, small_default,
    },
};
use crate::file_address::FileAddress;

#[derive(Debug, ClapArgs)]
pub(crate) struct SendArgs {
    /// Number of channels; must equal the multifd-channels of the destination; 0 = the destination has multifd off
    #[arg(long, alias = "channels", value_name = "N", default_value_t = small_default(MULTIFD_CHANNELS), value_parser = number::<u8>(0, 255))]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Limit in bytes per second over all connections, for example 100M (M = 1024 K); 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rate)]
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
    /// Connect timeout, TLS handshake included, in seconds or with a unit (500ms, 2m); 0 = system default
    #[arg(long, value_name = "TIME", default_value = default_seconds(CONNECT_TIMEOUT), value_parser = seconds)]
    connect_timeout: Duration,
    /// Time limit for a destination that accepts no data, in seconds or with a unit (500ms, 2m); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = default_seconds(STALL_TIMEOUT), value_parser = seconds)]
    stall_timeout: Duration,
    /// Time limit for the final confirmation of the destination, in seconds or with a unit (500ms, 2m); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = "600", value_parser = seconds)]
    end_timeout: Duration,
    /// Continue without a channel whose connection breaks, over the others; the destination is multifd receive with this flag
    #[arg(long)]
    pub(crate) channels_may_break: bool,
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
    /// Read FILE although it is damaged: do not compare it with its digests
    #[arg(long)]
    pub(crate) no_verify: bool,
    #[command(flatten)]
    pub(crate) postcopy: PostcopyArgs,
    /// Send requested pages over a connection of their own; the destination has capability postcopy-preempt on
    #[arg(long, requires = "postcopy")]
    pub(crate) postcopy_preempt: bool,
    /// Record the pages that the guest needs in FILE.working-set, so that the next start sends them first
    #[arg(long, requires = "postcopy")]
    pub(crate) record_working_set: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// File to send: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// Address of the destination: tcp:HOST:PORT[,OPTION...] as for receive, unix:PATH, vsock:CID:PORT, fd:N, or
    /// exec:COMMAND (writes to the input of the command, without channels)
    #[arg(value_parser = destination_address)]
    pub(crate) address: Address,
}

impl SendArgs {
    pub(crate) fn connect_timeout(&self) -> Duration {
        limit(self.connect_timeout).unwrap_or(Duration::MAX)
    }

    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        limit(self.stall_timeout)
    }

    /// `None` is no limit.
    pub(crate) fn end_timeout(&self) -> Option<Duration> {
        limit(self.end_timeout)
    }
}

/// TLS options of a source.
#[derive(Debug, ClapArgs)]
pub(crate) struct SendTlsArgs {
    /// Use TLS, with the certificates in DIR: ca-cert.pem, client-cert.pem, client-key.pem
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// Name that the certificate of the destination must contain; without it, the host in ADDRESS
    #[arg(long, value_name = "NAME", requires = "tls_creds")]
    tls_hostname: Option<String>,
}

impl SendTlsArgs {
    /// The name that the certificate at `address` must contain; not used without TLS.
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
