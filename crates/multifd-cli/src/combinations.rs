//! What cannot go together on a command line, judged before anything is opened: exit code 2, with the reason.
//!
//! Flags that are nothing without another one (`requires` in `args`) are refused by the parser, values by their ranges.

use multifd::{channel::Connect, error::Usage};

use crate::args::SendArgs;

/// Refuses what `send` cannot do.
///
/// # Errors
/// [`Usage::SingleConnection`], [`Usage::NoTlsHostname`].
pub(crate) fn of_send(args: &SendArgs) -> Result<(), Usage> {
    if args.address.is_single() && args.multifd_channels > 0 {
        return Err(Usage::SingleConnection(args.address.to_string()));
    }
    args.tls.hostname(&args.address).map(drop)
}
