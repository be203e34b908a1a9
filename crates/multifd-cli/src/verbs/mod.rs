//! The verbs of the program, one file each.

mod arrived;
pub(crate) mod capture;
pub(crate) mod ctl;
pub(crate) mod demo;
mod extract;
pub(crate) mod inspect;
pub(crate) mod many;
pub(crate) mod merge;
mod postcopy;
mod reading;
pub(crate) mod receive;
pub(crate) mod restore;
pub(crate) mod send;
mod tls;
pub(crate) mod verify;
