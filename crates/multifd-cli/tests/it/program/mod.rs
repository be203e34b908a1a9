//! What the command line promises: results on standard output, talk on standard error, exit codes, nothing left
//! half-made.

mod broken_off;
mod containers;
mod demo;
mod direct_io;
mod disks;
mod extract;
mod inspect;
mod limits;
mod pages;
mod parameters;
mod proxied;
mod receive;
mod security;
mod send;
mod stalls;
mod targets;
mod usage;
mod zero_copy;
