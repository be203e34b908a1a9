//! Refuses invalid combinations on a command line before anything is opened: exit code 2, with the reason.
//!
//! The parser refuses flags that need another one (`requires` in `args`), and checks values against their ranges.

use std::path::Path;

use multifd::{
    ChannelCount,
    channel::{Address, Connect},
    error::Usage,
    live::MigrateOptions,
};

use crate::{
    args::{DemoArgs, ReceiveArgs, ReturnPathArg, SendArgs},
    output::outcome::{Failure, While},
};

/// Refuses what `receive` does not support.
pub(crate) fn of_receive(args: &ReceiveArgs, listen: &Address, file: &Path) -> Result<(), Failure> {
    let refused = |usage: Usage| Failure::Usage(usage.into());
    listen.check_listen().map_err(|usage| match (listen, &usage) {
        (Address::Fd(fd), Usage::Descriptor { .. }) => {
            let instead = if *fd == 0 { "- as the address".to_owned() } else { format!("'exec:cat <&{fd}'") };
            Failure::Usage(format!("{usage}; use {instead} to receive from a pipe or a file").into())
        }
        _ => refused(usage),
    })?;
    if let (Address::Exec(_), ChannelCount::Exact(1..)) = (listen, args.multifd_channels) {
        return Err(refused(Usage::SingleConnection(args.listen.to_string())));
    }
    match listen {
        // The socket would be at the file's path when the file is to get its name.
        Address::Unix(socket) if same_place(socket, file) => {
            let why = "the socket and the file to write have the same path; use different paths";
            Err(Failure::Usage(While::new(format!("cannot listen at {}", args.listen), why).into()))
        }
        _ => Ok(()),
    }
}

/// Whether two paths name the same place, which may not exist yet.
fn same_place(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(folder.canonicalize().ok()?.join(path.file_name()?))
    };
    one == other || place(one).is_some_and(|one| place(other) == Some(one))
}

/// Refuses `channels-may-break` of `send` where no channel may break, with any destination.
pub(crate) fn of_channels_that_may_break(args: &SendArgs) -> Result<(), Failure> {
    let without = [
        (
            args.postcopy.is_on(),
            "with --postcopy-ram: --retry and --resume continue after a broken connection",
        ),
        (args.multifd_channels < 2, "with less than two channels"),
        (args.return_path == ReturnPathArg::Off, "with --return-path off, because the destination is asked"),
    ];
    match without.into_iter().find(|(given, _)| args.channels_may_break && *given) {
        None => Ok(()),
        Some((_, why)) => Err(Failure::Usage(format!("--channels-may-break has no effect {why}").into())),
    }
}

/// Refuses what `send` does not support.
///
/// # Errors
/// [`Usage::SingleConnection`], [`Usage::NoTlsHostname`], [`Usage::ZeroCopy`], [`Usage::Descriptor`],
/// [`Usage::WithoutChannels`], [`Usage::ChildrenIgnored`].
pub(crate) fn of_send(args: &SendArgs) -> Result<(), Usage> {
    if args.postcopy.is_on() {
        refuse_first(&[(args.zero_copy_send, "with postcopy-ram")])?;
        if args.compression.packs() {
            return Err(Usage::WithoutChannels("multifd-compression"));
        }
        args.tls.hostname(&args.address)?;
        return args.address.check_connect();
    }
    if args.address.is_single() && args.multifd_channels > 0 {
        return Err(Usage::SingleConnection(args.address.to_string()));
    }
    if args.multifd_channels == 0 && args.compression.packs() {
        return Err(Usage::WithoutChannels("multifd-compression"));
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
    args.tls.hostname(&args.address)?;
    args.address.check_connect()
}

/// Refuses what `demo` does not support.
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
