//! Names of connections, and times, as people read them.

use std::time::Duration;

use qemu_stream::recording::{Connection, ConnectionKind};

/// The name of a connection.
pub(super) fn name(connection: &Connection) -> String {
    match connection.kind {
        ConnectionKind::Main => "main".to_owned(),
        ConnectionKind::Channel(id) => format!("channel {id}"),
        ConnectionKind::Tls => format!("TLS {}", connection.number.number()),
        _ => format!("other {}", connection.number.number()),
    }
}

/// Milliseconds, with three digits after the point.
pub(super) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
