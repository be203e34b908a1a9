//! The command line of `multifd receive`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args as ClapArgs, ValueEnum};
use multifd::{
    ChannelCount, ChannelsFrom, Method,
    channel::{
        Address, Listen, Listener,
        tls::{ServerCredentials, TlsListener},
    },
    error::Usage,
};

use super::shared::{OutputArgs, file_address, seconds};
use crate::{file_address::FileAddress, output::outcome::While};

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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MissingPagesArg {
    /// The machine would not be whole
    #[default]
    Refuse,
    /// Pages that are lost on their way are kept as zero, too
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
