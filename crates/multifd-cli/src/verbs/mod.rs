//! What the program does: a file a verb.

pub(crate) mod demo;
mod extract;
pub(crate) mod inspect;
pub(crate) mod receive;
pub(crate) mod send;
mod tls;
