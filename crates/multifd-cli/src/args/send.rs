//! The command line of `multifd send`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use clap::{Args as ClapArgs, ValueEnum};
use multifd::{
    channel::{
        Address, Connect,
        tls::{ClientCredentials, TlsConnector},
    },
    error::Usage,
    wire::VmUuid,
};

use super::shared::{CompressionArgs, OutputArgs, ZeroPagesArg, file_address, seconds, size};
use crate::{file_address::FileAddress, output::outcome::While};

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
