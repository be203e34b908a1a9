//! The verbs of the program, one file each.

mod arrived;
pub(crate) mod capture;
pub(crate) mod ctl;
pub(crate) mod demo;
pub(crate) mod diff;
pub(crate) mod export;
mod extract;
pub(crate) mod find;
pub(crate) mod inspect;
pub(crate) mod many;
mod memory;
pub(crate) mod merge;
mod postcopy;
pub(crate) mod read;
mod reading;
pub(crate) mod receive;
pub(crate) mod record;
pub(crate) mod replay;
pub(crate) mod restore;
pub(crate) mod send;
mod tls;
pub(crate) mod verify;
