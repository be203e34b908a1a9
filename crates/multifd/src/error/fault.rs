//! Who or what ended a migration, for programs that decide by it.

use std::io::{self, ErrorKind};

use super::Error;
use crate::outcome::Fault;

impl Error {
    /// Who or what ended the migration.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Malformed(_) | Self::Violation(_) | Self::Unsupported(_) => Fault::Protocol,
            Self::Usage(_) => Fault::Caller,
            Self::Io { source, .. } => of_system(source),
            Self::TimedOut { .. } | Self::Stalled { .. } | Self::SwitchoverTimeout { .. } => Fault::Stalled,
            Self::NoSource { .. } | Self::TooManyRefused { .. } => Fault::Connection,
            Self::NotConverged(_) => Fault::NotConverged,
            Self::At(located) => located.error.fault(),
            Self::Other { fault, source, .. } => fault.unwrap_or_else(|| of_cause(&**source)),
            Self::Text { fault, .. } => fault.unwrap_or(Fault::Caller),
            Self::OwnerUnknown(_) => Fault::OwnerUnknown,
            Self::Panicked { call, .. } | Self::CallbackHangs { call, .. } => call.fault(),
            Self::NotResumed { error, .. } => error.fault(),
            Self::Cancelled => Fault::Cancelled,
        }
    }
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Fault {
    if let Some(error) = cause.downcast_ref::<Error>() {
        return error.fault();
    }
    cause.downcast_ref::<io::Error>().map_or(Fault::Caller, of_system)
}

/// Who is at fault for an error that the system reports about a connection.
fn of_system(error: &io::Error) -> Fault {
    match error.kind() {
        ErrorKind::TimedOut => Fault::Stalled,
        ErrorKind::ConnectionRefused
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable
        | ErrorKind::NetworkDown
        | ErrorKind::NotConnected
        | ErrorKind::BrokenPipe
        | ErrorKind::UnexpectedEof
        | ErrorKind::WriteZero => Fault::Connection,
        _ => Fault::System,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{error::Usage, outcome::Callback, wire::ChannelId};

    #[test]
    fn a_fault_is_found_below_places_and_causes() {
        let reset = || io::Error::from(ErrorKind::ConnectionReset);
        let late = Error::TimedOut { what: "no reply came".into(), limit: Duration::from_secs(1) };
        let panicked = |call| Error::Panicked { call, text: String::new() };
        for (error, fault) in [
            (Error::io("send", reset()).on_channel(ChannelId(3)), Fault::Connection),
            (Error::io("write", ErrorKind::StorageFull.into()), Fault::System),
            (Error::other("receive", reset()), Fault::Connection),
            (Error::other("receive", late.clone()).at("main"), Fault::Stalled),
            (Error::OwnerUnknown(Box::new(late)), Fault::OwnerUnknown),
            (Error::other("map the memory", "refused"), Fault::Caller),
            (Error::other("stop the guest", reset()).because(Fault::Guest), Fault::Guest),
            (panicked(Callback::GuestStop), Fault::Guest),
            (panicked(Callback::DirtyLogTake), Fault::DirtyLog),
            (panicked(Callback::MakeBlocks), Fault::Caller),
            (Error::CallbackHangs { call: Callback::GuestSave, waited: Duration::ZERO }, Fault::Guest),
            (Error::text("another version"), Fault::Caller),
            (Error::text("no state").because(Fault::Guest).at("restore"), Fault::Guest),
            (Usage::UsedTwice.into(), Fault::Caller),
            (Error::Cancelled, Fault::Cancelled),
        ] {
            assert_eq!(error.fault(), fault, "{error:?}");
        }
    }
}
