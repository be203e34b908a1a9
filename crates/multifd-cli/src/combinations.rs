//! What cannot go together on a command line, judged before anything is opened: exit code 2, with the reason.
//!
//! Flags that are nothing without another one (`requires` in `args`) are refused by the parser, values by their ranges.

use multifd::{
    channel::{Address, Connect},
    error::Usage,
    live::MigrateOptions,
};

use crate::args::{DemoArgs, SendArgs};

/// Refuses what `send` cannot do.
///
/// # Errors
/// [`Usage::SingleConnection`], [`Usage::NoTlsHostname`], [`Usage::ZeroCopy`].
pub(crate) fn of_send(args: &SendArgs) -> Result<(), Usage> {
    if args.address.is_single() && args.multifd_channels > 0 {
        return Err(Usage::SingleConnection(args.address.to_string()));
    }
    let copied = [
        (args.multifd_channels == 0, "with multifd-channels 0"),
        (args.compression.packs(), "with multifd-compression"),
        (args.tls.encrypts(), "with tls-creds"),
        (args.direct_io, "with direct-io"),
        (!matches!(args.address, Address::Tcp { .. }), "over anything but plain TCP"),
    ];
    if args.zero_copy_send {
        refuse_first(&copied)?;
    }
    args.tls.hostname(&args.address).map(drop)
}

/// Refuses what `demo` cannot do.
///
/// # Errors
/// [`Usage::ZeroCopy`], [`Usage::OutOfRange`].
pub(crate) fn of_demo(args: &DemoArgs) -> Result<(), Usage> {
    let packs = args.zero_copy_send && args.compression.packs();
    refuse_first(&[(packs, "with multifd-compression")])?;
    args.converge.apply(MigrateOptions::new()).check()
}

fn refuse_first(copied: &[(bool, &'static str)]) -> Result<(), Usage> {
    copied.iter().find(|(so, _)| *so).map_or(Ok(()), |(_, with)| Err(Usage::ZeroCopy(with)))
}
