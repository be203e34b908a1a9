//! Flags and value parsers that the command lines of several verbs share.

use std::{str::FromStr, time::Duration};

use clap::{
    Args as ClapArgs, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use multifd::{Method, SendOptions, live::ZeroPageDetection};
use parse_size::Config;

use crate::file_address::FileAddress;

/// The compression options of a source.
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
    /// Whether pages are compressed.
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

#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct OutputArgs {
    /// Print one JSON object at the end, with the fields of QEMU's query-migrate
    #[arg(long)]
    pub(crate) json: bool,
    /// Print errors only; receive also prints its address
    #[arg(long, short)]
    pub(crate) quiet: bool,
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
    /// The mode; `auto` is returned if the user leaves the choice to the caller.
    pub(crate) fn or(self, auto: ZeroPageDetection) -> ZeroPageDetection {
        match self {
            Self::Auto => auto,
            Self::None => ZeroPageDetection::None,
            Self::Legacy => ZeroPageDetection::Legacy,
            Self::Multifd => ZeroPageDetection::Multifd,
        }
    }
}

/// A time limit; 0 is no limit.
pub(super) fn seconds(limit: u64) -> Option<Duration> {
    (limit > 0).then(|| Duration::from_secs(limit))
}

/// A path, or QEMU's form of it.
pub(super) fn file_address() -> impl TypedValueParser<Value = FileAddress> {
    OsStringValueParser::new().try_map(FileAddress::parse)
}

/// Parses bytes with binary units as in QEMU: 1K is 1024.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let parsed = Config::new().with_binary().parse_size(text.trim_end_matches("/s"));
    parsed.map_err(|error| format!("expected a size in bytes like 4096, 100M or 2G: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_nonsense_is_refused() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("100M/s"), Ok(100 << 20));
        assert!(size("lots").is_err() && size("-1").is_err() && size("99999999E").is_err());
    }
}
